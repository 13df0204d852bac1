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
    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert {"config", "read", "wrote", "counts", "versions"} <= manifest.keys()
    assert manifest["wrote"] == {"out": {"bytes": 5, "sha256": digest}}
    assert (manifest["read"], manifest["config"]["size"]) == ({"x": "1"}, 3)
    assert stage.outputs(tmp_path / "run/a") == {"run/a/out": digest}


def test_another_config_or_input_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "CONFIGS", {})  # other tests have loaded configs of the name "mine"
    monkeypatch.setattr(stage, "GOAL", "")  # and made stages
    make(tmp_path / "mine/packed")
    with pytest.raises(UserError, match=r'size was 3, is now 4; names\[0\] was "a", is now "b"\. Give') as error:
        make(tmp_path / "mine/packed", Config(size=4, names=("b",)))
    assert str(error.value).endswith("python pipeline.py configs/mine.py --force-from pack")
    with pytest.raises(UserError, match=r'limit was not set, is now 7; x was "1", is now "2"; y0 .* and 6 more'):
        make(tmp_path / "mine/packed", Config(limit=7), {"x": "2"} | {f"y{i}": str(i) for i in range(7)})
    assert not make(tmp_path / "mine/packed", read={})  # inputs gone: what was made from them stands
    different = stage_of(tmp_path / "mine/packed", Config(size=4, rate=1.0))
    assert different.state() == "stale: size was 3, is now 4; rate was 0.5, is now 1.0"


def test_changed_code_is_one_warning(tmp_path, monkeypatch, caplog):
    """However many stages it made. The commands are about the stages that this command wants."""
    monkeypatch.setattr(stage, "CONFIGS", {tmp_path.name: "mine.py"})
    directories = [tmp_path / name for name in ("corpus", "packed", "pretrain", "sft")]
    for directory in directories[1:]:
        make(directory)
        manifest = stage.read_manifest(directory) | {
            "code": dict.fromkeys(("a.py", "b.py", "c.py", "d.py", "e.py"), "0")
        }
        stage.write_manifest(directory, manifest)
        assert not make(directory)
        assert stage_of(directory).state() == "done, but a.py, b.py, c.py and 2 more changed since"
    for goal, command in {"": "--force-from pack", "pretrain": "pretrain --force-from pack"}.items():
        monkeypatch.setattr(stage, "GOAL", goal)
        caplog.clear()
        stage.warn_of_changed_code(directories, {"e.py": "0"})
        [warning] = caplog.messages
        assert "packed is kept, but a.py, b.py, c.py and 1 more changed since" in warning
        assert warning.endswith(f"python pipeline.py mine.py {command}")


def test_the_code_that_makes_a_stage(tmp_path, monkeypatch):
    assert {"model.py", "sft/train.py", "dpo/loss.py", "data/pack.py"} <= stage.imported_code("pipeline.py").keys()
    assert not {"model.py", "cli.py"} & stage.imported_code("data/corpus.py").keys()
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
    with pytest.raises(UserError, match="unfinished; make it with: make it"):
        stage.finished(tmp_path / "a", "make it")
    assert make(tmp_path / "a")
    assert not (tmp_path / "a/half").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("hellO", "out has SHA-256"), ("hell", "out has 4 bytes; its manifest says 5"), (None, "out is missing")],
)
def test_damage_is_named(tmp_path, monkeypatch, content, message):
    monkeypatch.setitem(stage.CONFIGS, "mine", "elsewhere/my.py")
    make(tmp_path / "mine/packed")
    (tmp_path / "mine/packed/out").write_text(content) if content else (tmp_path / "mine/packed/out").unlink()
    with pytest.raises(UserError, match=f"{message}.*; make it again with: python pipeline.py elsewhere/my.py pack"):
        stage.finished(tmp_path / "mine/packed")


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
    for content in ("", "[]", '{"config": {}, "wrote": {}}', "\x00" * 40):
        path.write_text(content)
        with pytest.raises(UserError, match=r"manifest.json is damaged.*delete it"):
            stage.read_manifest(tmp_path)


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
    numbers = (read.append(number) or number for number in range(40))
    with cli.pool(3) as pool:
        for done, result in enumerate(cli.ordered(pool, abs, numbers, 5)):
            assert result == done
            assert len(read) <= done + 6


def test_progress_off_a_terminal(monkeypatch, caplog):
    caplog.set_level("INFO")
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    assert list(cli.progress("abcdefgh", 8, "letters", "spelling")) == list("abcdefgh")
    for expected in (100.0, 0.0):  # 0: unknown
        done = iter([(5.0, expected), (10.0, expected), (15.0, expected)])
        list(cli.progress("abc", lambda done=done: next(done), "MB", "reading"))
    assert caplog.messages == [
        "spelling: 3 of 8 letters, 0.2 a second, 20 s left",
        "spelling: 6 of 8 letters, 0.2 a second, 8 s left",
        "reading: 15 of 100 MB, 1.2 a second, 68 s left",
        "reading: 15 MB, 1.2 a second",
    ]


def test_tables():
    rows = [("stage", "seconds"), ("pack", "1.9"), ("pretrain", "178.0")]
    assert cli.table(rows, right=[1]) == "stage     seconds\npack          1.9\npretrain    178.0"
    assert cli.table(rows, [1], markdown=True) == (
        "| stage    | seconds |\n| ---      |     --: |\n| pack     |     1.9 |\n| pretrain |   178.0 |"
    )
