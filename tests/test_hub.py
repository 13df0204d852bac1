"""The recipes that read the Hugging Face Hub, by the real clients, against a Hub on loopback: see tests/hub.py."""

import json
import os
import re
import shutil
import signal

import huggingface_hub
import pytest

import stage
from eval.tasks import PUBLISHED
from tests import hub_datasets
from tests.conftest import Place
from tests.hub import serving

RECIPES = ["tokenizer_web", "micro_web", "tiny_web", "small_web", "base_web"]
SMALL = """
from dataclasses import replace

import data.corpus
from configs.{name} import experiment as shipped

data.corpus.SHARD_BYTES = 20_000  # so that a corpus has several, after each of which it can continue
TRAIN = {{
    "steps": 10, "epochs": None, "batch_size": 4, "micro_batch_size": 2, "eval_every": 5, "eval_rows": 8,
    "save_every": 4, "log_every": 1, "compile": False, "precision": "float32", "deterministic": True,
}}


def small(e):
    sources = tuple(replace(source, max_tokens=10_000) for source in e.corpus.sources)
    shape = {{"vocab_size": 512, "context_length": 128, "n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 2}}
    return replace(
        e,
        model=replace(e.model, **shape),
        corpus=replace(e.corpus, sources=sources),
        tokenizer=replace(e.tokenizer, vocab_size=512),
        pretrain=replace(e.pretrain, warmup_steps=2, **TRAIN),
        mixture=tuple(replace(phase, start=min(phase.start, 5)) for phase in e.mixture),
        sft=replace(e.sft, train=replace(e.sft.train, **TRAIN)),
        dpo=replace(e.dpo, train=replace(e.dpo.train, **TRAIN)),
        shared={{name: small(other) for name, other in e.shared.items()}},
    )


experiment = small(shipped)
"""


class Web(Place):
    """A directory whose commands read a Hub on loopback."""

    def __init__(self, path, hub):
        super().__init__(path)
        self.hub = hub
        self.raw.mkdir(parents=True)
        self.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(path / "hf"), "NO_PROXY": "127.0.0.1,localhost"}
        self.env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "2", "HF_HUB_ETAG_TIMEOUT": "2", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def small(self, name: str, *pairs: tuple[str, str]):
        """A config: a shipped one at a small budget, changed text by text."""
        self.config = self.path / f"{name}.py"
        self.config.write_text(SMALL.format(name=name))
        return self.edit(*pairs)

    def refused(self, *stages: str) -> str:
        """Runs stages of the config and expects a refusal: warnings, and then one line. Returns the line."""
        process = self.start("pipeline.py", self.config, *stages)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 2, f"{out}\n{err}"
        *_, line = err.splitlines()
        assert line.startswith("error: "), err
        return line

    def counts(self, name: str) -> dict:
        return stage.read_manifest(self.runs / name)["counts"]

    def content(self, name: str) -> dict[str, bytes]:
        """What a stage wrote that does not tell the time."""
        files = [path for path in (self.runs / name).rglob("*") if path.suffix in (".jsonl", ".bin", ".txt", ".pt")]
        return {str(path.relative_to(self.runs)): path.read_bytes() for path in files if path.name not in TIMED}


TIMED = ("log.txt", "metrics.jsonl")


@pytest.fixture(scope="module")
def repositories():
    return hub_datasets.all_of_them()


@pytest.fixture
def web(repositories, tmp_path):
    with serving(repositories) as hub:
        yield Web(tmp_path, hub)


@pytest.fixture(scope="module")
def pretrained(repositories, tmp_path_factory):
    """With all that tiny_web makes."""
    with serving(repositories) as hub:
        web = Web(tmp_path_factory.mktemp("web"), hub)
        web.output = web.run("pipeline.py", web.small("tiny_web"), "corpus", "tokenizer", "pack", "pretrain").stdout
        yield web


def test_the_clients_read_the_hub_through_a_fault(tmp_path):
    files = {"README.md": b"# A", "data/train-0.parquet": bytes(range(256)) * 40, "data/a/b.json": b"{}"}
    with serving({"a/b": files}) as hub:
        api = huggingface_hub.HfApi(endpoint=hub.url)
        first = api.dataset_info("a/b").sha
        listed = {entry.path for entry in api.list_repo_tree("a/b", recursive=True, repo_type="dataset")}
        assert listed == {"data", "data/a", *files}
        second = hub.push("a/b", files | {"README.md": b"# B"})
        for revision, text in ((None, "# B"), ("main", "# B"), (first, "# A"), (second, "# B")):
            options = {"revision": revision, "repo_type": "dataset", "cache_dir": tmp_path}
            path = api.hf_hub_download("a/b", "README.md", **options)
            with open(path) as file:
                assert file.read() == text
        with pytest.raises(huggingface_hub.errors.RevisionNotFoundError):
            api.dataset_info("a/b", revision="x")
        with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
            api.dataset_info("a/c")
        hub.fault("GET /lfs/", "cut")
        system = huggingface_hub.HfFileSystem(endpoint=hub.url, skip_instance_cache=True)
        with system.open(f"datasets/a/b@{first}/data/train-0.parquet", block_size=1_000) as file:
            file.seek(5_000)
            assert file.read(100) == files["data/train-0.parquet"][5_000:5_100]
        assert sum("GET /lfs/" in request for request in hub.requests) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_web_recipe_runs(pretrained, name):
    stages = ("tokenizer",) if name == "tokenizer_web" else ("corpus", "tokenizer", "pack", "pretrain")
    pretrained.run("pipeline.py", pretrained.small(name), *stages)
    for source in pretrained.counts(f"{name}/corpus")["sources"].values():
        assert source["documents"] > 5
        assert "unreadable" not in source["dropped"]
    if name != "tokenizer_web":
        steps = (pretrained.runs / name / "pretrain/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in steps][-1] == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["oasst1", "chat_mix"])
def test_a_chat_recipe_runs(pretrained, name):
    sources = {"oasst1": ["oasst1"], "chat_mix": ["oasst1", "wizardlm", "openorca"]}[name]
    pretrained.run("pipeline.py", pretrained.small(name), "sft_data", "sft")
    counts = pretrained.counts(f"{name}/sft_data")["sources"]
    assert list(counts) == sources
    for source in counts.values():
        assert source["kept"] > 40
        assert "unreadable" not in source["dropped"]
    assert counts["oasst1"]["dropped"] == {"other_language": 6}  # the trees whose `lang` is "de"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "unreadable", "kept"), [("hh_rlhf", 8, 152), ("orca_dpo", 0, 120)])
def test_a_preference_recipe_runs(pretrained, name, unreadable, kept):
    pretrained.run("pipeline.py", pretrained.small("oasst1"), "sft")
    pretrained.run("pipeline.py", pretrained.small(name), "dpo_data", "dpo")
    [counts] = pretrained.counts(f"{name}/dpo_data")["sources"].values()
    assert counts["read"] == 160 - 40 * (name == "orca_dpo")
    assert counts["dropped"].get("unreadable", 0) == unreadable
    assert counts["kept"] == kept


@pytest.mark.slow
def test_download_brings_the_evaluation_sets(web, monkeypatch):
    web.hub.fault("GET .*/tree/", 500)
    web.hub.fault("HEAD .*boolq/resolve/.*parquet", 429)
    web.hub.fault("GET /lfs/.*hellaswag", "cut")
    web.hub.fault("GET /lfs/.*piqa", "slow", seconds=3)
    monkeypatch.setenv("DATA", str(web.raw))
    web.run("-m", "eval.download")
    assert [fault.pattern for fault in web.hub.faults if fault.times] == []
    counts = {name: len(published.load(published.find())) for name, published in PUBLISHED.items()}
    assert counts.pop("wikitext2") > 100
    assert counts == dict.fromkeys(("boolq", "arc_easy", "piqa", "hellaswag", "winogrande"), 1) | {"blimp": 2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [500, "cut", "slow"])
def test_an_evaluation_set_that_does_not_arrive_is_named(web, kind):
    web.hub.fault("GET /lfs/.*piqa", kind, times=1_000, seconds=3 * (kind == "slow"))
    process = web.start("-m", "eval.download", "boolq", "piqa")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    assert "error: cannot load the dataset baber/piqa" in err
    assert "boolq" in out
    assert [path.name for path in web.raw.iterdir()] == ["boolq_val.jsonl"]


# --------------------------------------------------------------------------------------------------------------- faults

ONCE = [
    "HEAD .*/resolve/main/README",
    "GET .*/revision/",
    "GET .*/tree/",
    "GET .*edu/resolve/.*parquet",
    "GET /lfs/.*c4",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [429, 500, "cut", "slow"])
def test_a_passing_fault_changes_nothing(pretrained, web, kind):
    for pattern in ONCE:
        web.hub.fault(pattern, kind, seconds=3 * (kind == "slow"))
    web.run("pipeline.py", web.small("tiny_web"), "corpus")
    assert [fault.pattern for fault in web.hub.faults if fault.times] == []
    assert web.content("tiny_web/corpus") == pretrained.content("tiny_web/corpus")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [429, 500])
def test_a_lasting_fault_is_named(web, kind):
    sooner = "import datasets\ndatasets.config.STREAMING_READ_MAX_RETRIES = 1\n"  # not 20, with a minute between them
    sooner += "datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 1\n"
    web.small("tiny_web", ("import data.corpus", f"{sooner}import data.corpus"), ("=10_000)", "=10_000, retries=1)"))
    web.hub.fault("GET /lfs/.*fineweb", kind, times=1_000)
    assert re.search("fineweb-edu: .*attempt 2.*; the same command continues", web.refused("corpus"))


@pytest.mark.slow
def test_a_hub_out_of_reach_is_named_once_and_finished_data_stands_without_it(repositories, tmp_path):
    with serving(repositories) as hub:
        web = Web(tmp_path, hub)
        web.run("pipeline.py", web.small("tiny_web"), "corpus")
    assert "up to date" in web.run("pipeline.py", web.config, "corpus").stdout
    shutil.rmtree(web.runs)
    assert "error: dataset HuggingFaceFW/fineweb-edu: " in web.refused("corpus")


@pytest.mark.slow
def test_what_the_hub_lacks_is_named(web):
    web.small("tiny_web")
    for pair, message in (
        (("max_tokens=10_000", 'max_tokens=10_000, revision="v1"'), "Revision 'v1' doesn't exist for dataset"),
        (('revision="v1"', 'subset="sample-1BT"'), "BuilderConfig 'sample-1BT' not found. Available: .*sample-10BT"),
        (('subset="sample-1BT"', 'dataset="a/b"'), "Dataset 'a/b' doesn't exist on the Hub or cannot be accessed"),
    ):
        web.edit(pair)
        assert re.search(message, web.refused("corpus"))


@pytest.mark.slow
def test_a_commit_that_comes_while_a_dataset_is_read_waits_for_the_next_run(repositories, pretrained, web):
    """Between the manifest's inputs and the first record, and before a retry, main moves to other texts."""
    other = hub_datasets.fineweb_edu(hub_datasets.random.Random("other"))
    name = "HuggingFaceFW/fineweb-edu"
    fault = web.hub.fault(f"GET .*{name}/resolve/.*parquet", 404, action=lambda: web.hub.push(name, other))
    web.run("pipeline.py", web.small("tiny_web"), "corpus")
    assert fault.hit.is_set()
    assert web.content("tiny_web/corpus") == pretrained.content("tiny_web/corpus")


@pytest.mark.slow
def test_only_a_commit_that_changes_the_files_read_makes_a_finished_corpus_stale(repositories, web):
    c4 = repositories["allenai/c4"]
    web.run("pipeline.py", web.small("tiny_web"), "corpus")
    first = web.content("tiny_web/corpus")
    web.hub.push("allenai/c4", c4 | {"README.md": c4["README.md"] + b"News\n", "realnewslike/a": b""})
    assert "up to date" in web.run("pipeline.py", web.config, "corpus").stdout
    name = "en/c4-train.00001-of-01024.json.gz"
    web.hub.push("allenai/c4", c4 | {name: c4["en/c4-validation.00000-of-00008.json.gz"]})
    assert "corpus was made from something else: allenai/c4/en/train was" in web.refused("corpus")
    web.run("pipeline.py", web.config, "corpus", "--force")
    assert web.content("tiny_web/corpus").keys() == first.keys()


def killed(web: Web, fault, *stages: str) -> None:
    """Kills a command that waits for an answer of the Hub."""
    process = web.start("pipeline.py", web.config, *stages, start_new_session=True)
    assert fault.hit.wait(100), process.communicate()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    fault.times = 0


@pytest.mark.slow
@pytest.mark.parametrize("moves", [False, True])
def test_a_killed_corpus_is_continued_and_after_a_new_commit_begun_again(repositories, pretrained, web, moves):
    web.small("tiny_web")
    killed(web, web.hub.fault("GET /lfs/.*gutenberg", "slow", 1_000, seconds=600), "corpus")
    done = sorted((web.runs / "tiny_web/corpus").glob("shard_*"))
    assert len(done) > 2
    if moves:
        wikipedia = hub_datasets.wikipedia(hub_datasets.random.Random("other"))
        web.hub.push("wikimedia/wikipedia", wikipedia)
    out = web.run("pipeline.py", web.config, "corpus").stdout
    assert ("continuing with" in out) != moves
    expected = pretrained
    if moves:
        expected = Web(web.path / "fresh", web.hub)
        expected.run("pipeline.py", expected.small("tiny_web"), "corpus")
    assert web.content("tiny_web/corpus") == expected.content("tiny_web/corpus")


@pytest.mark.slow
def test_a_killed_recipe_ends_with_the_same_bytes(pretrained, web):
    """Killed while conversations are read, and while pairs are; then faults that pass."""
    shutil.copytree(pretrained.runs / "tiny_web", web.runs / "tiny_web")
    shutil.copytree(pretrained.runs / "tokenizer_web", web.runs / "tokenizer_web")
    for name, file, stages in (
        ("oasst1", "data/train", ["sft_data", "sft"]),
        ("hh_rlhf", "online", ["dpo_data", "dpo"]),
    ):
        pretrained.run("pipeline.py", pretrained.small(name), *stages)
        web.small(name)
        killed(web, web.hub.fault(f"GET /lfs/.*{file}", "slow", 1_000, seconds=600), *stages)
        for pattern, kind in (
            ("GET .*/revision/", 500),
            (f"GET .*/resolve/.*{file}", 429),
            (f"GET /lfs/.*{file}", "cut"),
        ):
            web.hub.fault(pattern, kind)
        web.run("pipeline.py", web.config, *stages)
        assert [fault.pattern for fault in web.hub.faults if fault.times] == []
        for made in stages:
            assert web.content(f"{name}/{made}") == pretrained.content(f"{name}/{made}")


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def exported(made, tmp_path_factory) -> dict[str, bytes]:
    """The files of a small model as transformers reads them."""
    out = tmp_path_factory.mktemp("exported") / "model"
    made.run("convert.py", "to-hf", made.config, out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def imported(directory) -> dict[str, bytes]:
    """What from-hf wrote that does not tell where."""
    names = ("weights.pt", "tokenizer/spm.model", "tokenizer/tokenizer.json")
    return {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}


@pytest.mark.slow
def test_a_model_is_imported_by_name(exported, web):
    directory = web.path / "model"
    directory.mkdir()
    for name, content in exported.items():
        (directory / name).write_bytes(content)
    web.run("convert.py", "from-hf", directory, web.path / "local")
    web.hub.push("acme/tiny", exported | {"model.gguf": b"not fetched"}, kind="models", ref="v1")
    for pattern, kind in (("HEAD .*config.json", 500), ("GET .*/api/models", 429), ("GET /lfs/", "cut")):
        web.hub.fault(pattern, kind)
    web.hub.fault("GET /lfs/", "slow", seconds=3)
    web.run("convert.py", "from-hf", "acme/tiny", web.path / "remote", "--revision", "v1")
    assert [fault.pattern for fault in web.hub.faults if fault.times] == []
    assert imported(web.path / "remote") == imported(web.path / "local")
    assert len(imported(web.path / "local")) == 2
    assert not any("gguf" in request for request in web.hub.requests if "/api/" not in request)


@pytest.mark.slow
def test_what_cannot_be_imported_is_refused_before_its_weights_are_fetched(exported, web):
    config = json.loads(exported["config.json"])
    for name, changes in (("moe", {"architectures": ["MixtralForCausalLM"]}), ("bias", {"attention_bias": True})):
        changed = exported | {"config.json": json.dumps(config | changes).encode()}
        web.hub.push(f"acme/{name}", changed, kind="models")
    for name, message in (
        ("acme/moe", r"\['MixtralForCausalLM'\], supported are LlamaForCausalLM"),
        ("acme/bias", "attention_bias is True, supported is False"),
        ("acme/none", "cannot download acme/none: RepositoryNotFoundError"),
        ("acme/bias --revision v2", "cannot download acme/bias: RevisionNotFoundError"),
        ("nowhere", "no directory nowhere; expected one, or a model's name on the Hub"),
    ):
        arguments = name.split()
        process = web.run("convert.py", "from-hf", arguments[0], web.path / "out", *arguments[1:], status=2)
        assert re.search(message, process.stderr)
    assert not any("safetensors" in request for request in web.hub.requests)
    assert not (web.path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [500, "cut", "slow"])
def test_weights_that_do_not_arrive_are_named(exported, web, kind):
    web.hub.push("acme/tiny", exported, kind="models")
    web.hub.fault("GET /lfs/", kind, times=1_000, seconds=3 * (kind == "slow"))
    process = web.start("convert.py", "from-hf", "acme/tiny", web.path / "out")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2, err
    assert "error: cannot download acme/tiny" in err
