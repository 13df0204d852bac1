"""Stage directories: finished or not, from the same inputs or not; types of configs; progress, tables and workers."""

import contextlib
import dataclasses
import json
import os

import pytest

import cli
import stage
from cli import UserError
from stage import Stage


@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 3
    rate: float = 0.5
    names: tuple[str, ...] = ("a",)
    limit: int | None = None
    free: int = 0

    def __post_init__(self):
        stage.check_types(self)


def stage_of(directory, config=None, read=None) -> Stage:
    read = {"x": "1"} if read is None else read
    return Stage(directory, config or Config(), read, "make it", stage.__file__, free={"free"})


def make(directory, config=None, read=None, force=False) -> bool:
    """Makes a directory unless it is up to date. Returns True if it did."""
    job = stage_of(directory, config, read)
    if job.up_to_date(force):
        return False
    with job.making():
        (directory / "out").write_text("hello")
        job.finish({"n": 1})
    return True


def test_made_once(tmp_path):
    assert make(tmp_path / "run/a")
    assert not make(tmp_path / "run/a")
    assert not make(tmp_path / "run/a", Config(free=9))
    assert make(tmp_path / "run/a", force=True)
    manifest = json.loads((tmp_path / "run/a/manifest.json").read_text())
    assert {"config", "read", "wrote", "counts", "versions"} <= manifest.keys()
    assert manifest["wrote"] == {
        "out": {"bytes": 5, "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}
    }
    assert manifest["read"] == {"x": "1"}
    assert manifest["config"]["size"] == 3
    assert stage.outputs(tmp_path / "run/a") == {"run/a/out": manifest["wrote"]["out"]["sha256"]}


def test_another_config_or_input_stops(tmp_path):
    make(tmp_path / "mine/packed")
    with pytest.raises(UserError, match=r'size was 3, is now 4; names\[0\] was "a", is now "b"\. Give') as error:
        make(tmp_path / "mine/packed", Config(size=4, names=("b",)))
    assert str(error.value).endswith("mine.py --force-from pack")
    with pytest.raises(UserError, match="limit was not set, is now 7"):
        make(tmp_path / "mine/packed", Config(limit=7))
    with pytest.raises(UserError, match=r'x was "1", is now "2"; y0 was .*; y2 .* and 4 more'):
        make(tmp_path / "mine/packed", read={"x": "2"} | {f"y{i}": str(i) for i in range(7)})
    assert not make(tmp_path / "mine/packed", read={})  # inputs gone: what was made from them stands
    assert (
        stage_of(tmp_path / "mine/packed", Config(size=4, rate=1.0)).state() == "stale: size was 3, is now 4 and 1 more"
    )


def test_a_warning_about_changed_code_comes_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(stage, "warned", bytearray(1))
    caplog.set_level("INFO")
    for name in ("sft", "dpo"):
        make(tmp_path / name)
        manifest = stage.read_manifest(tmp_path / name) | {"code": {"model.py": "0", "optim.py": "0", "lora.py": "0"}}
        stage.write_manifest(tmp_path / name, manifest)
    caplog.clear()
    assert not make(tmp_path / "sft")
    assert not make(tmp_path / "dpo")
    warning, line = caplog.records
    assert "sft is kept, but model.py and 2 more changed since" in warning.message
    assert warning.message.endswith(f"configs/{tmp_path.name}.py --force-from sft")
    assert (line.levelname, line.message) == ("INFO", f"{tmp_path}/dpo is up to date, but older than the code")
    assert stage_of(tmp_path / "dpo").state() == "done, but model.py and 2 more changed since"


def test_the_code_that_makes_a_stage(tmp_path, monkeypatch):
    assert {"model.py", "sft/train.py", "dpo/loss.py", "data/pack.py"} <= stage.imported_code("pipeline.py").keys()
    assert "model.py" not in stage.imported_code("data/corpus.py")
    assert "cli.py" not in stage.imported_code("pipeline.py")
    monkeypatch.setattr(stage, "ROOT", tmp_path)
    for name, text in {"a": "from b import c", "b": "import os", "other": "import a"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    before = stage.imported_code(str(tmp_path / "a.py"))
    assert before.keys() == {"a.py", "b.py"}
    (tmp_path / "b.py").write_text("a syntax error (")  # edited while a pipeline runs: its code is in memory already
    assert stage.imported_code(str(tmp_path / "other.py")) == before | {"other.py": stage.sha256(tmp_path / "other.py")}


def test_interrupted_making_is_unfinished(tmp_path):
    make(tmp_path / "a")

    def interrupt():
        (tmp_path / "a/half").write_text("…")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), stage_of(tmp_path / "a", read={}).making():
        interrupt()
    assert stage.read_manifest(tmp_path / "a") is None
    with pytest.raises(UserError, match="unfinished; make it with: make it"):
        stage.finished(tmp_path / "a", "make it")
    assert make(tmp_path / "a")
    assert not (tmp_path / "a/half").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("hellO", "out has SHA-256"), ("hell", "out has 4 bytes; its manifest says 5"), (None, "out is missing")],
)
def test_damage_is_named(tmp_path, content, message):
    make(tmp_path / "a")
    (tmp_path / "a/out").write_text(content) if content else (tmp_path / "a/out").unlink()
    with pytest.raises(UserError, match=f"{message}.*; make it again with: make it --force"):
        stage.finished(tmp_path / "a", "make it")


def test_a_command_in_a_message_names_the_config_that_was_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(stage.CONFIGS, "mine", "elsewhere/my.py")
    with pytest.raises(UserError, match=r"make it with: python pipeline.py elsewhere/my.py pack$"):
        stage.finished(tmp_path / "mine/packed")
    assert stage.remaker(tmp_path / "other/dpo") == "python pipeline.py configs/other.py --force-from dpo"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": {}, "wrote": {}}', "\x00" * 40])
def test_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json is damaged.*delete it"):
        stage.read_manifest(tmp_path)


def test_a_manifest_vouches_for_itself(tmp_path):
    """Flips a bit of each byte: the manifest is read as it was written, or called damaged."""
    manifest = {"config": {"lr": 1e-05, "word": "größer"}, "read": {"x": "1"}, "wrote": {}, "counts": {"step": 15}}
    stage.write_manifest(tmp_path, manifest)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << i % 7
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert stage.read_manifest(tmp_path) == json.loads(whole)
    path.write_text(json.dumps(json.loads(whole), indent=7))
    assert stage.read_manifest(tmp_path)["counts"] == {"step": 15}


def test_second_writer_is_refused(tmp_path):
    with stage.locked(tmp_path), pytest.raises(UserError, match="another process"), stage.locked(tmp_path):
        pass
    with stage.locked(tmp_path):
        pass


def test_types():
    Config(rate=1, limit=7, names=())
    for wrong in ({"size": 1.0}, {"size": True}, {"rate": "1"}, {"names": ["a"]}, {"names": (1,)}, {"limit": "7"}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            Config(**wrong)


def test_a_worker_that_is_killed_is_an_error_not_a_wait():
    with pytest.raises(UserError, match="a worker process was killed"), cli.pool(2) as pool:
        list(pool.map(_die_at_three, range(6)))


def _die_at_three(i: int) -> None:
    if i == 3:
        os.kill(os.getpid(), 9)


def test_work_is_given_out_in_order_and_read_only_so_far_ahead():
    read = []

    def numbers():
        for number in range(40):
            read.append(number)
            yield number

    with cli.pool(3) as pool:
        for done, result in enumerate(cli.ordered(pool, abs, numbers(), 5)):
            assert result == done
            assert len(read) <= done + 6


def test_progress_off_a_terminal(monkeypatch, caplog):
    caplog.set_level("INFO")
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    assert list(cli.progress("abcdefgh", 8, "letters", "spelling")) == list("abcdefgh")
    assert caplog.messages == [
        "spelling: 3 of 8 letters, 0.2 a second, 20 s left",
        "spelling: 6 of 8 letters, 0.2 a second, 8 s left",
    ]
    caplog.clear()
    done = ((5.0 * i, 100.0) for i in range(1, 99))
    list(cli.progress("abcd", lambda: next(done), "MB", "reading"))
    assert caplog.messages == ["reading: 15 of 100 MB, 1.2 a second, 68 s left"]
    caplog.clear()
    done = ((5.0 * i, 0.0) for i in range(1, 99))
    list(cli.progress("abcd", lambda: next(done), "MB", "reading"))
    assert caplog.messages == ["reading: 15 MB, 1.2 a second"]


def test_tables():
    rows = [("stage", "seconds"), ("pack", "1.9"), ("pretrain", "178.0")]
    assert cli.table(rows, right=[1]) == "stage     seconds\npack          1.9\npretrain    178.0"
    assert cli.table(rows, [1], markdown=True) == (
        "| stage    | seconds |\n| ---      |     --: |\n| pack     |     1.9 |\n| pretrain |   178.0 |"
    )
