"""Stage directories: finished or not, of the same inputs or not; and the checks of config types."""

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


def make(directory, config=None, read=None, force=False) -> bool:
    """Makes a directory unless it is up to date; whether it did."""
    job = Stage(
        directory, config or Config(), {"x": "1"} if read is None else read, "make it", stage.__file__, free={"free"}
    )
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
    assert manifest["wrote"] == {
        "out": {"bytes": 5, "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}
    }
    assert manifest["read"] == {"x": "1"}
    assert manifest["config"]["size"] == 3
    assert stage.outputs(tmp_path / "run/a") == {"run/a/out": manifest["wrote"]["out"]["sha256"]}


def test_another_config_or_input_stops(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(UserError, match=r'size was 3, is now 4; names\[0\] was "a", is now "b"'):
        make(tmp_path / "a", Config(size=4, names=("b",)))
    with pytest.raises(UserError, match='x was "1", is now "2"'):
        make(tmp_path / "a", read={"x": "2"})
    with pytest.raises(UserError, match="make it --force"):
        make(tmp_path / "a", Config(size=4))
    assert not make(tmp_path / "a", read={})  # inputs gone: what was made from them stands


def test_interrupted_making_is_unfinished(tmp_path):
    make(tmp_path / "a")
    job = Stage(tmp_path / "a", Config(size=4), {}, "make it", stage.__file__)

    def interrupted():
        with job.making():
            (tmp_path / "a/half").write_text("…")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stage.read_manifest(tmp_path / "a") is None
    with pytest.raises(UserError, match="unfinished; make it with: make it"):
        stage.finished(tmp_path / "a", "make it")
    assert make(tmp_path / "a")
    assert not (tmp_path / "a/half").exists()


def test_damage_is_named(tmp_path):
    make(tmp_path / "a")
    (tmp_path / "a/out").write_text("hellO")
    with pytest.raises(UserError, match="out has SHA-256"):
        stage.finished(tmp_path / "a", "make it")
    (tmp_path / "a/out").write_text("hell")
    with pytest.raises(UserError, match="out has 4 bytes; its manifest says 5"):
        stage.finished(tmp_path / "a", "make it")
    (tmp_path / "a/out").unlink()
    with pytest.raises(UserError, match="out is missing"):
        stage.finished(tmp_path / "a", "make it")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"config": {}, "read": {}, "wrote": {}, "counts": {}}', "\x00" * 40]
)
def test_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="is damaged; delete it"):
        stage.read_manifest(tmp_path)


@pytest.mark.parametrize("wrong", [{"config": 1}, {"wrote": {"weights.pt": 3}}, {"counts": None}])
def test_a_signed_manifest_of_other_contents_is_named(tmp_path, wrong):
    stage.write_manifest(tmp_path, {"config": {}, "read": {}, "wrote": {}, "counts": {}} | wrong)
    with pytest.raises(UserError, match="is damaged; delete it"):
        stage.read_manifest(tmp_path)


def test_a_manifest_vouches_for_itself(tmp_path):
    """Every bit of it, one at a time: what is read is what was written, or is called damaged. The one bit that changes
    nothing turns 1e-05 into 1E-05."""
    manifest = {"config": {"lr": 1e-05, "word": "größer"}, "read": {"x": "1"}, "wrote": {}, "counts": {"step": 15}}
    stage.write_manifest(tmp_path, manifest)
    path = tmp_path / "manifest.json"
    whole, harmless = path.read_bytes(), []
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert json.dumps(stage.read_manifest(tmp_path)) == json.dumps(json.loads(whole))
            harmless.append(bytes(damaged))
    assert harmless == [whole.replace(b"1e-05", b"1E-05")]
    path.write_text(json.dumps(json.loads(whole), indent=7))
    assert stage.read_manifest(tmp_path)["counts"] == {"step": 15}


def test_second_writer_is_refused(tmp_path):
    with stage.locked(tmp_path), pytest.raises(UserError, match="another process"), stage.locked(tmp_path):
        pass
    with stage.locked(tmp_path):
        pass


def test_a_worker_that_is_killed_is_an_error_not_a_wait():
    with pytest.raises(UserError, match="a worker process was killed"), cli.pool(2) as pool:
        list(pool.map(_die_at_three, range(6)))


def _die_at_three(i: int) -> None:
    if i == 3:
        os.kill(os.getpid(), 9)


def test_types():
    Config(rate=1, limit=7, names=())
    for wrong in ({"size": 1.0}, {"size": True}, {"rate": "1"}, {"names": ["a"]}, {"names": (1,)}, {"limit": "7"}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            Config(**wrong)


def test_progress_yields_everything():
    assert list(cli.progress(iter("abc"), 3, "letters", "reading")) == ["a", "b", "c"]


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


def test_a_pool_within_a_pool_leaves_the_outer_one_alone():
    with cli.pool(1) as outer:
        with cli.pool(1) as inner:
            assert inner.submit(abs, -2).result() == 2
        assert outer.submit(abs, -3).result() == 3


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
    done = iter([(0.0, 0.0), *((5.0 * i, 100.0) for i in range(99))])
    list(cli.progress("abcd", lambda: next(done), "MB", "reading"))
    assert caplog.messages == ["reading: 10 of 100 MB, 0.8 a second, 108 s left"]
    caplog.clear()
    done = iter([(0.0, 0.0), *((5.0 * i, 0.0) for i in range(99))])
    list(cli.progress("abcd", lambda: next(done), "MB", "reading"))
    assert caplog.messages == ["reading: 10 MB, 0.8 a second"]
