"""A small experiment on real text, and the commands run as a user runs them."""

import argparse
import ctypes
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small for more, and tests often share a machine

import hypothesis
import pytest
import torch
from torch.overrides import TorchFunctionMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import configs
import pipeline

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and the commands would too
hypothesis.settings.register_profile("suite", deadline=None, max_examples=25)
hypothesis.settings.load_profile("suite")
ROOT = Path(__file__).resolve().parent.parent

MINI = """
from configs import Experiment
from data.corpus import CorpusConfig
from data.pack import PackConfig
from data.sources import Files
from dpo.data import PairConfig
from dpo.filters import PairFilters
from dpo.pairs import Pairs
from dpo.train import DPOConfig
from eval import EvalConfig
from model import ModelConfig
from sft.conversations import Chats
from sft.data import ConversationConfig
from lora import LoRAConfig
from sft.train import SFTConfig
from tokenizer.train import TokenizerConfig
from trainer import TrainConfig

experiment = Experiment(
    name="mini",
    model=ModelConfig(vocab_size=512, context_length=64, n_layers=2, d_model=32, n_heads=2),
    corpus=CorpusConfig(sources=(Files(paths=("text.jsonl",), min_chars=20),)),
    tokenizer=TokenizerConfig(vocab_size=512, algorithm="bpe"),
    pack=PackConfig(val_fraction=0.1),
    pretrain=TrainConfig(
        steps=24, batch_size=12, micro_batch_size=4, learning_rate=3e-3, warmup_steps=4, compile=False,
        precision="float32", deterministic=True, log_every=1, eval_every=8, eval_rows=8, save_every=5,
    ),
    sft=SFTConfig(
        data=ConversationConfig(sources=(Chats(paths=("chats.jsonl",)),), val_fraction=0.2),
        lora=LoRAConfig(rank=4, alpha=8.0, dropout=0.1),
        train=TrainConfig(
            steps=10, batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup_fraction=0.2, compile=False,
            precision="float32", deterministic=True, log_every=1, eval_every=4, eval_rows=8, save_every=3,
        ),
    ),
    dpo=DPOConfig(
        data=PairConfig(
            sources=(Pairs(paths=("pairs.jsonl",)),), filters=PairFilters(language=None), val_fraction=0.25,
        ),
        lora=LoRAConfig(rank=3, alpha=6.0, dropout=0.0),
        train=TrainConfig(
            steps=9, batch_size=6, micro_batch_size=3, learning_rate=5e-3, warmup_fraction=0.25, schedule="linear",
            weight_decay=0.0, compile=False, precision="float32", deterministic=True, log_every=1, eval_every=4,
            eval_rows=64, save_every=3,
        ),
    ),
    eval=EvalConfig(continuations=2, prompt_tokens=8, new_tokens=8),
)
"""


WORDS = ["a", "in", "is", "on", "or", "to", "if", "of", "as", "at", "it"]
CHATS = [{"prompt": f"Say {a} {b}.", "response": f"{a} {b}"} for a in WORDS for b in WORDS[:4]]
PREFERENCES = [
    {"prompt": f"Say {a} {b}.", "chosen": f"{a} {b}", "rejected": f"No, {b}!"} for a in WORDS for b in WORDS[:4]
]


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def build(name: str, experiment: configs.Experiment, force: bool = False, **switches) -> Path:
    """Makes a stage and what it needs, as pipeline.py does, but in this process. Returns its directory."""
    directory = experiment.directory(name)
    defaults = {"workers": 1, "resume": "auto", "checkpoint": None, "again": [directory] if force else []}
    pipeline.make([name], experiment, argparse.Namespace(**defaults | switches), apart=False)
    return directory


PRESENT = os.environ.copy() | {"PYTHONPATH": str(ROOT)}  # the fork server's environment


@functools.cache
def fork_server() -> tuple[socket.socket, subprocess.Popen]:
    """The fork server of this process and a socket to it: see tests/forkserver.py."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, ROOT / "tests/forkserver.py", str(theirs.fileno())]
    quiet = dict.fromkeys(("stdin", "stdout"), subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=ROOT, env=PRESENT, pass_fds=[theirs.fileno()], **quiet)
    theirs.close()
    return ours, process


def adopt_orphans(yes: bool) -> None:
    """Says whether a descendant whose parent ends becomes a child of this process."""
    ctypes.CDLL(None).prctl(36, int(yes), 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def pytest_sessionfinish() -> None:
    if fork_server.cache_info().currsize:
        requests, process = fork_server()
        requests.close()
        process.wait()


class Command(subprocess.Popen):
    """A Python command under way. The fork server starts it, unless its environment differs in more than DATA, RUNS."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        changed = {name for name in env.keys() | PRESENT.keys() if env.get(name) != PRESENT.get(name)}
        if preexec_fn or cwd != ROOT or changed - {"DATA", "RUNS"}:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        pipes, start_new_session = rest[3:9], rest[14]
        request = json.dumps([args[1:], dict(env), start_new_session]).encode()
        adopt_orphans(True)
        socket.send_fds(fork_server()[0], [request], [pipes[0], pipes[3], pipes[5]])
        self.pid = int(fork_server()[0].recv(99))
        fork_server()[0].recv(99)  # now the command is our child
        adopt_orphans(False)
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def wait_for(self, text: str) -> None:
        """Reads its output until a line has the text."""
        while text not in (line := self.stdout.readline()):
            assert line, f"the command ended without {text!r}: {self.communicate()}"


class AsOnGPU(TorchFunctionMode):
    """Computes on the CPU what the model would compute on a GPU. Keeps what it asks of PyTorch."""

    def __init__(self):
        super().__init__()
        self.attention = []  # heads of the keys, whether query heads share them, whether cuDNN may be used
        self.pinned, self.copied = [], []  # tensors that were pinned, and that were copied without waiting

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function == torch.Tensor.pin_memory:
            self.pinned.append(args[0])
            return args[0]
        if function == torch.Tensor.to and kwargs.get("non_blocking"):
            self.copied.append(args[0])
            return args[0]
        if function == torch.nn.functional.scaled_dot_product_attention:
            self.attention.append((args[1].shape[1], kwargs["enable_gqa"], torch.backends.cuda.cudnn_sdp_enabled()))
        return function(*args, **kwargs)


class Place:
    """A directory with the raw text, a config and room for runs."""

    def __init__(self, path: Path):
        self.path, self.config = path, path / "mini.py"
        self.raw, self.runs = path / "raw", path / "runs"
        self.env = PRESENT | {"DATA": str(self.raw), "RUNS": str(self.runs)}

    def start(self, *arguments, **options) -> Command:
        """Starts a command from the repository's root."""
        command = [sys.executable, *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return Command(command, cwd=ROOT, env=self.env, text=True, **pipes, **options)

    def run(self, *arguments, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess:
        """Runs a command and expects an exit status; for 2, the user's mistake, one line on standard error."""
        process = self.start(*arguments)
        out, err = process.communicate(stdin, timeout=240)
        assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
        if status == 2:
            assert err.startswith("error: "), err
            assert err.count("\n") == 1, err
        return subprocess.CompletedProcess(arguments, status, out, err)

    def make(self, name: str, **switches) -> Path:
        """Makes a stage of the config in this process: see `build`."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DATA", str(self.raw))
            patch.setenv("RUNS", str(self.runs))
            return build(name, configs.load(self.config), **switches)

    def edit(self, *pairs: tuple[str, str]) -> Path:
        """Changes the config, text by text."""
        text = self.config.read_text()
        for before, after in pairs:
            assert before in text
            text = text.replace(before, after)
        self.config.write_text(text)
        return self.config

    def metrics(self, stage: str = "pretrain") -> list[dict]:
        """What training logged, but for the clock."""
        lines = (self.runs / "mini" / stage / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="session")
def text() -> list[str]:
    """Paragraphs of tests/text.txt: 16 kB of an early model.py, kept so that no test depends on what it has become."""
    return [part for part in (ROOT / "tests/text.txt").read_text("utf-8").split("\n\n") if len(part) > 20]


def copied(place: Place, path: Path) -> Place:
    return Place(shutil.copytree(place.path, path, dirs_exist_ok=True))


def furnish(path: Path, text: list[str]) -> Place:
    """Text and config in a directory, nothing made yet."""
    (path / "raw").mkdir()
    write_lines(path / "raw/text.jsonl", ({"text": part} for part in text))
    write_lines(path / "raw/chats.jsonl", CHATS)
    write_lines(path / "raw/pairs.jsonl", PREFERENCES)
    (path / "mini.py").write_text(MINI)
    return Place(path)


@pytest.fixture
def place(tmp_path: Path, text: list[str]) -> Place:
    """A fresh directory: text and config, nothing made yet."""
    return furnish(tmp_path, text)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, text: list[str]) -> Place:
    """One with corpus, tokenizer and packed tokens, and a model trained without a disturbance."""
    place = furnish(tmp_path_factory.mktemp("made"), text)
    place.output = place.run("train.py", place.config).stdout
    return place


@pytest.fixture
def packed(made: Place, tmp_path: Path) -> Place:
    """A copy of it that has everything but the trained model."""
    shutil.copytree(made.path, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/mini/pretrain")
    return Place(tmp_path)


@pytest.fixture
def trained(made: Place, tmp_path: Path) -> Place:
    """A copy of it with the trained model."""
    return copied(made, tmp_path)


@pytest.fixture(scope="session")
def fine_tuned(made: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One whose model is fine-tuned too, without a disturbance."""
    place = copied(made, tmp_path_factory.mktemp("tuned"))
    place.output = place.run("pipeline.py", place.config, "sft").stdout
    return place


@pytest.fixture
def tuned(fine_tuned: Place, tmp_path: Path) -> Place:
    """A copy of it."""
    return copied(fine_tuned, tmp_path)


@pytest.fixture(scope="session")
def preferring(fine_tuned: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One whose fine-tuned model has learnt preferences too, without a disturbance."""
    place = copied(fine_tuned, tmp_path_factory.mktemp("preferring"))
    place.output = place.run("pipeline.py", place.config, "dpo").stdout
    return place
