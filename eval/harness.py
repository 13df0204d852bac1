"""Runs any task of EleutherAI's lm-evaluation-harness with our model and decoder.

    python -m eval.harness configs/tiny.py --tasks arc_easy,gsm8k,mmlu    ->  runs/tiny/eval/harness.json

`lm_eval --model hf --device cpu --model_args pretrained=OUT,dtype=float32` gives the same numbers for the model that
convert.py exports to OUT. If the tokenizer is ours, add `,add_bos_token=True`: a text begins as in training.
Next: compare harness.json with the published numbers of models of this size
"""

import argparse
import itertools
import json
import logging
from pathlib import Path

import numpy as np
import torch

import checkpoint
import cli
import configs
import machine
import stage
from cli import UserError, extra, log, progress
from eval.choices import Scored, fit, log_likelihoods
from eval.language import Subject, token_nats
from generate import Continuation, Decoder, Sampling
from sft.conversations import Message
from sft.templates import ends, render

try:
    from lm_eval import simple_evaluate, tasks, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError:
    TemplateLM = object  # `main` says what is missing


class Harness(TemplateLM):
    """The methods that the harness calls. A request's `args` are texts. rows: how many texts are decoded together."""

    eot_token_id = prefix_token_id = tokenizer_name = ""  # properties in the base class

    def __init__(self, subject: Subject, chat: bool, rows: int):
        super().__init__()
        self.subject, self.spm, self.chat, self.rows = subject, subject.tokenizer, chat, rows
        self.eot_token_id, self.prefix_token_id, self.tokenizer_name = self.spm.eos, self.spm.bos, self.spm.sha256
        self.length, self.truncated = subject.model.config.context_length, 0  # contexts that lost their beginning

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """A conversation as JSON, then the beginning of its last answer, if a task gives that beginning."""
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        return json.dumps(chat_history if add_generation_prompt else chat_history[:-1]) + begun

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """The ids of a text. A conversation becomes ids only here, so that no message can fake a control piece."""
        if self.chat and add_special_tokens is None:
            turns, end = json.JSONDecoder().raw_decode(string)
            messages = [Message(turn["role"], turn["content"]) for turn in turns]
            ids, _ = render(self.subject.template, messages, self.spm, ask=True)
            # The ids that open the answer are given. The harness scores a line end at their end with the answer.
            return ids + self.spm.encode(string[end:], begins=False)
        opening = [] if add_special_tokens is False else self.spm.opening
        return opening + self.spm.encode(string)

    def _loglikelihood_tokens(self, requests: list, **_) -> list[tuple[float, bool]]:
        """log p in nats of each (texts, context, ENDING), and whether greedy decoding would write the ending."""
        texts, longest = [], 0
        for _, context, ending in requests:
            texts.append(fit(Scored(context + ending, len(context)), self.length))
            longest = max(longest, len(ending))
            self.truncated += len(context) + len(ending) > len(texts[-1].ids)
        if longest > self.length:
            raise UserError(f"a task scores {longest:,} tokens at once; the model's context has {self.length:,}")
        log_p, greedy = log_likelihoods(self.subject, texts, "log-likelihoods")
        return list(zip(log_p.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        """log p in nats of each text, in windows that do not overlap."""
        # The harness puts bos before a text even if the tokenizer has done so: Llama's models read it twice there.
        log_p, twice = [], self.spm.bos != self.spm.eos
        for request in progress(requests, len(requests), "texts", "rolling log-likelihoods"):
            ids = self.tok_encode(request.args[0], twice)
            log_p.append(-float(token_nats(self.subject, np.array(ids), self.length).sum()) if ids else 0.0)
        return log_p

    def generate_until(self, requests: list) -> list[str]:
        """The model's continuation of each context, up to the first stop string."""
        texts, answers = {}, {}
        for seed, request in enumerate(requests):
            text, until = self.continuation(*request.args, seed)
            texts[text] = len(text.ids), until
        decoder = Decoder(self.subject.model, self.rows, max(len(text.ids) + text.left for text in texts))
        for text in texts:
            decoder.add(text)
        for _ in progress(itertools.count(), lambda: (len(texts) - len(decoder), len(texts)), "texts", "generation"):
            if not decoder:
                break
            for text, _ in decoder.step():
                if text.error:
                    raise UserError(str(text.error))
                start, until = texts[text]
                whole = answer = self.spm.decode(text.ids[start:])
                for stop in until:
                    answer = answer.partition(stop)[0]
                if answer != whole and not text.ended:
                    decoder.remove(text)
                answers[text] = answer
        return [answers[text] for text in texts]

    def continuation(self, context: str, options: dict, seed: int) -> tuple[Continuation, list[str]]:
        """A text to continue, and its stop strings. UserError for options that the decoder does not have."""
        ids, options = self.tok_encode(context) or [self.spm.bos], normalize_gen_kwargs(options)
        until, new = [stop for stop in options.pop("until") if stop], options.pop("max_gen_toks")
        greedy = {} if options.pop("do_sample") else {"temperature": 0.0}
        if options.pop("num_beams", 1) > 1 or new >= self.length:
            raise UserError(f"a task asks for beams, or {new:,} new tokens; the model's context has {self.length:,}")
        stop = set(ends(self.subject.template, self.spm)) if self.subject.template else {self.spm.eos}
        stop |= {self.spm.control[piece] for piece in until if piece in self.spm.control}
        room = self.length - new
        self.truncated += len(ids) > room
        try:
            sampling = Sampling(**options | greedy)
        except (TypeError, ValueError) as error:
            raise UserError(f"a task asks for sampling that the decoder does not have: {error}") from None
        return Continuation(ids[-room:], new, sampling, seed, stop), until


def main(arguments: argparse.Namespace) -> None:
    extra("lm_eval", "lm_eval", "eval.harness")
    logging.getLogger("lm_eval").setLevel("ERROR")
    experiment = configs.load(arguments.config)
    final = Path(arguments.checkpoint).absolute() if arguments.checkpoint else experiment.latest()
    directory = final.parent / f"eval_{final.name}" if arguments.checkpoint else experiment.directory("eval")
    spm, template = experiment.load_tokenizer(final), checkpoint.template(final)
    checkpoint.must_match(final, spm.sha256)
    if arguments.chat and template is None:
        raise UserError(f"{final} has learnt no chat template; leave out --chat, or fine-tune it first")
    names, manager = arguments.tasks.split(","), tasks.TaskManager(include_path=arguments.include)
    try:
        loaded = manager.load(names)
    except Exception as error:  # whatever a task's code or the Hub raises
        raise UserError(f"cannot load {arguments.tasks}: {error}; `lm_eval ls tasks` lists all tasks") from None
    if unsafe := [task for task, content in loaded["tasks"].items() if getattr(content, "UNSAFE_CODE", False)]:
        raise UserError(f"{unsafe[0]} runs programs that the model writes; eval.harness does not")
    manager.load = lambda _: loaded  # simple_evaluate would load them again
    torch.set_float32_matmul_precision("highest")
    model = checkpoint.load_model(final, str(machine.pick_device()))
    lm = Harness(Subject(model, spm, template), arguments.chat, arguments.batch_size)
    options = {"apply_chat_template": arguments.chat, "num_fewshot": arguments.num_fewshot, "limit": arguments.limit}
    out = simple_evaluate(lm, tasks=names, task_manager=manager, **options)
    if lm.truncated:
        log.warning(f"{lm.truncated:,} contexts lost their beginning: the model's context has {lm.length:,} tokens")
    directory.mkdir(parents=True, exist_ok=True)
    found = stage.read_json(directory / "harness.json") or {}
    about = {"chat": arguments.chat, "checkpoint": checkpoint.digest(final), "tokenizer": spm.sha256}
    for task, numbers in out["results"].items():
        about |= {"num_fewshot": out["n-shot"].get(task), "version": out["versions"].get(task)}
        found.setdefault(f"{final}{' --chat' * arguments.chat}", {})[task] = numbers | about
    text = json.dumps(found, default=float)
    stage.write_json(directory / "harness.json", json.loads(text, parse_constant=lambda _: None))  # not finite: null
    print(utils.make_table(out))
    log.info(f"evaluated: {directory / 'harness.json'}")


if __name__ == "__main__":
    p = cli.parser(__doc__)
    p.add_argument("--tasks", required=True, metavar="TASK,…", help="the harness's tasks or groups, or YAML files")
    p.add_argument("--include", metavar="DIR", help="a directory with your own tasks")
    p.add_argument("--checkpoint", metavar="DIR", help="a trained model, instead of the latest")
    p.add_argument("--limit", type=cli.positive, metavar="N", help="items of each task (all)")
    p.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (as the task says)")
    p.add_argument("--chat", action="store_true", help="ask in the template in which the model learnt to answer")
    p.add_argument("--batch-size", type=cli.positive, default=8, metavar="N", help="texts decoded together (8)")
    cli.run(main, p.parse_args())
