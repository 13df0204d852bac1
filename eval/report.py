"""A run to a page with pictures, from the files that its stages left.

    python pipeline.py configs/tiny.py report   ->  runs/tiny/REPORT.md, runs/tiny/plots/; the summary on the terminal

Nothing is measured here: what the page says, a stage has written.
"""

import os
import statistics
import sys
from pathlib import Path

import torch

import stage
from cli import log
from configs import Experiment
from eval.markdown import block, clock, finite, number, show, table, visible, wrapped
from eval.run import LOGGED, TRAINED, Run, measured, read
from eval.tables import evaluation, main_metric, value
from model import ModelConfig, Transformer

WRITTEN = {
    "answers": "Questions held out from fine-tuning",
    "prompts": "Longer prompts",
    "everyday": "Everyday prompts",
    "smoke": "Short prompts, and the rules that their answers are to keep",
    "continuations": "Held-out beginnings, continued",
}  # the tasks whose texts are kept, and as what
LABELS = {"accuracy": "accuracy", "bits_per_byte": "bits a byte", "passed": "share of prompts passed"}
LABELS |= {"loss": "nats a token of an answer", "win_rate": "share of pairs won"}
FLAGS = ("seed", "ended", "marked")  # of a text, what is no measurement
SHOWN = ("spm.model", "train.bin", "val.bin", "weights.pt", "adapter.pt", "results.json", "generations.json")


def write(experiment: Experiment) -> None:
    """Writes REPORT.md and its plots, and logs the summary."""
    run = read(experiment)
    pictures = draw(run)
    text = page(run, pictures)
    with stage.locked(run.home):
        if pictures:
            (run.home / "plots").mkdir(exist_ok=True)
        for name, png in (pictures or {}).items():
            stage.write(run.home / "plots" / f"{name}.png", png)
        stage.write(run.home / "REPORT.md", text.encode())  # last: until then the earlier page stands
    log.info("\n\n".join(opening(run, pictures)))
    log.info(f"\nNext:\n\n{following(run)}\n\n{run.home / 'REPORT.md'} has the whole report")


def draw(run: Run) -> dict[str, bytes] | None:
    """The pictures by name, as PNG; None without matplotlib."""
    os.environ.pop("MPLBACKEND", None)  # of screens, which matplotlib would want to have before it draws files
    try:
        from eval import plots
    except ImportError:
        return None
    units = {"dpo": "a pair"}
    pictures = {
        name: plots.curves(records, f"{run.experiment.name}: {name}", units.get(name, "nats a token"))
        for name, records in run.metrics.items()
        if records
    }
    panels = {}
    for task in run.tasks():
        found = {name: measured(entries, task) for name, entries in run.results.items()}
        first, key = next(entry for entry in found.values() if entry), main_metric(task, found.values())
        bars = {
            name: (e[key], e["stderr"] if finite(e.get("stderr")) else 0)
            for name, e in found.items()
            if e and finite(e.get(key))
        }
        label = LABELS.get(key)
        if bars and label:
            panel = panels.setdefault(key, {"label": label, "tasks": {}})
            panel["tasks"][task] = {"baseline": first.get("baseline"), "stages": bars}
    if panels:
        pictures["evaluation"] = plots.bars(list(panels.values()))
    return pictures


# ------------------------------------------------------------------------------------------------------------- the page


def page(run: Run, pictures: dict[str, bytes] | None) -> str:
    """All of it, in Markdown that a terminal shows as well."""
    parts = [*opening(run, pictures), model(run)]
    pictures = pictures or {}
    parts += ["## Pipeline", pipeline(run), "## Corpus and tokenizer", *cards(run)]
    for name in TRAINED:
        if name in run.manifests or name in run.metrics:
            parts += [f"## Training: {name}", *training(run, name, pictures)]
    parts += ["## Evaluation", *evaluation(run, pictures)]
    if any(run.generations.values()):
        parts += ["## What it says", *samples(run)]
    parts += ["## How it was made", *provenance(run), "## What the numbers do not show", *limits(run)]
    parts += ["## Next", following(run)]
    laid = (part if part.lstrip("\n").startswith(("|", "    ")) else wrapped(part) for part in parts if part)
    return "\n\n".join(laid) + "\n"


def opening(run: Run, pictures: dict[str, bytes] | None) -> list[str]:
    """What comes first: title, notes, and what came out."""
    notes = list(run.notes)
    if pictures is None:
        notes.append("No plots: matplotlib is not installed; `pip install matplotlib`, then the same command again.")
    return [f"# {run.experiment.name}", *(wrapped(f"**Note.** {note}") for note in notes), wrapped(summary(run))]


def summary(run: Run) -> str:
    said = []
    if "pretrain" in run.finals:
        said.append(f"{run.experiment.name} has {parameters(run):,} parameters.")
    for name, manifest in run.finals.items():
        if last := manifest["counts"].get("record"):
            said.append(
                f"{name} took {manifest['counts']['step']:,} steps over {last['tokens']:,} "
                f"{'' if name == 'pretrain' else 'trained '}tokens "
                f"({last['epoch']:.2f} epochs)."
            )
    for name, entries in run.results.items():
        if (e := measured(entries, "validation")) and finite(e.get("bits_per_byte")) and finite(e.get("baseline")):
            said.append(
                f"After {name} it takes {value(e, 'bits_per_byte', 'bits_per_byte')} bits for a byte of held-out text, "
                f"{e['bits_per_byte'] / e['baseline']:.3f} of what xz -9 takes ({show(e['baseline'])})."
            )
    costs = [(name, e) for name, entries in run.results.items() if (e := measured(entries, "answers"))]
    if len(costs) > 1 and all(finite(e.get("loss")) and finite(e.get("loss_words")) for _, e in costs):
        told = ", ".join(
            f"{value(e, 'loss', 'loss')} after {name} (their words alone {value(e, 'loss_words', 'loss')})"
            for name, e in costs
        )
        said.append(f"Held-out answers cost, in nats a token: {told}.")
    said += alignment(run)
    if not run.results:
        return " ".join(said)
    latest = list(run.results)[-1]
    sides = {"above the baseline": [], "below the baseline": [], "not to be told from the baseline": []}
    for task in run.tasks():
        e = measured(run.results[latest], task)
        if not e or not all(finite(e.get(key)) for key in ("accuracy", "baseline", "p_value")):
            continue
        side = 2 if e["p_value"] >= 0.05 else int(e["accuracy"] < e["baseline"])
        list(sides.values())[side].append(f"{task} {value(e, 'accuracy', 'accuracy')} ({show(e['baseline'])})")
    told = [f"{side} in {', '.join(tasks)}" for side, tasks in sides.items() if tasks]
    if told:
        said.append(f"After {latest} its accuracy is {'; '.join(told)} (the baseline in brackets; tested at 0.05).")
    if e := measured(run.results[latest], "smoke"):
        said.append(f"After {latest} it passes {round(e['passed'] * e['n'])} of the {e['n']} short prompts.")
    return " ".join(said)


def alignment(run: Run) -> list[str]:
    """What dpo has brought, and what it has cost beside the stage before it."""
    names = list(run.results)
    if "dpo" not in names:
        return []
    said, entry = [], measured(run.results["dpo"], "preference") or {}
    if finite(entry.get("win_rate")):
        kinds = ", ".join(f"{k} {value(e, 'win_rate', 'win_rate')}" for k, e in entry.get("by_kind", {}).items())
        said.append(
            f"Of {show(entry.get('n', '–'))} held-out pairs dpo wins {value(entry, 'win_rate', 'win_rate')}"
            + f" ({kinds})" * bool(kinds)
            + "; the model that it began from ties them all, 0.5."
        )
    if finite(entry.get("win_rate_length_matched")) and finite(entry.get("longer_wins")):
        matched = value(entry, "win_rate_length_matched", "win_rate")
        said.append(
            f"Always to take the longer answer would win {show(entry['longer_wins'])}; with lengths matched, where "
            f"that wins half, dpo wins {matched} of the {entry['pairs_length_matched']:,.0f} pairs that are left."
        )
    found = {name: (measured(entries, "preference") or {}).get("likelier") for name, entries in run.results.items()}
    if likelier := ", ".join(f"{show(share)} after {name}" for name, share in found.items() if finite(share)):
        said.append(f"The chosen answer is by itself the likelier one in {likelier} of the pairs.")
    if finite(entry.get("reward_chosen")) and entry["reward_chosen"] < 0:
        said.append(
            "dpo has made the chosen answers less likely too, only less so than the rejected ones; `chosen_weight` of "
            "its loss works against that."
        )
    if names.index("dpo"):
        before, told = names[names.index("dpo") - 1], []
        costs = (("validation", "bits_per_byte"), ("answers", "loss"), ("boolq", "accuracy"), ("blimp", "accuracy"))
        for task, key in costs:
            pair = [measured(run.results[name], task) for name in (before, "dpo")]
            if all(e and finite(e.get(key)) for e in pair) and pair[0][key]:
                change = pair[1][key] / pair[0][key] - 1
                told.append(f"{task} {' -> '.join(value(e, key, key) for e in pair)} ({change:+.1%})")
        if told:
            said.append(f"What that has cost, from {before} to dpo: {', '.join(told)}.")
    return said


def model(run: Run) -> str:
    if "pretrain" not in run.finals:
        return ""
    c = shape(run)
    rows = [
        ["parameters", f"{parameters(run):,}"],
        ["layers × width", f"{c.n_layers} × {c.d_model}, feed-forward {c.d_ff or 4 * c.d_model:,}"],
        ["heads", f"{c.n_heads} of {c.head_dim}, with {c.n_kv_heads or c.n_heads} of keys and values"],
        ["vocabulary", f"{c.vocab_size:,}, embeddings {'tied' if c.tie_embeddings else 'untied'}"],
        ["context", f"{c.context_length:,} tokens"],
    ]
    return table(["model", ""], rows)


def shape(run: Run) -> ModelConfig:
    """As the checkpoint's manifest has it, whatever the config says by now."""
    fields = run.finals["pretrain"]["config"]["model"]
    return ModelConfig(**{key: given for key, given in fields.items() if key != "type"})


def parameters(run: Run) -> int:
    with torch.device("meta"):
        return Transformer(shape(run)).num_parameters()


def pipeline(run: Run) -> str:
    rows, total = [], 0.0
    for name in run.manifests:
        directory = run.directories[name]
        seconds = stage.read_seconds(directory.parent).get(directory.name)
        total += seconds or 0.0
        rows.append([name, f"{os.path.relpath(directory, run.home)}/", clock(seconds)])
    return table(["stage", "made", "in"], [*rows, ["all", "", clock(total)]])


def cards(run: Run) -> list[str]:
    said = []
    if corpus := run.manifests.get("corpus"):
        licences = {source["name"]: source.get("licence", "") for source in corpus["config"]["sources"]}
        rows = [
            [name, licences.get(name, ""), show(c["read"]), show(c["documents"]), f"{c['bytes'] / 1e6:,.1f}"]
            for name, c in corpus["counts"]["sources"].items()
        ]
        said.append(table(["source", "licence", "read", "kept", "MB kept"], rows))
        card = os.path.relpath(run.directories["corpus"] / "DATA_CARD.md", run.home)
        said.append(f"Left out: {listed(corpus['counts']['dropped'])}. Examples of each: `{card}`.")
    if pack := run.manifests.get("pack"):
        rows = [
            [name, *(show(pack["counts"][split][key]) for key in ("documents", "tokens", "bytes"))]
            for name, split in (("to train on", "train"), ("held out", "val"))
        ]
        said.append(table(["packed", "documents", "tokens", "bytes"], rows))
    if tokens := run.manifests.get("tokenizer"):
        numbers = {k.replace("_", " "): v for k, v in tokens["counts"].items() if number(v)}
        algorithm = tokens["config"].get("tokenizer", {}).get("algorithm", "SentencePiece")
        rows = [["algorithm", algorithm], *([name, show(n)] for name, n in numbers.items())]
        said.append(table(["tokenizer", "on a sample of the corpus"], rows))
    if chats := run.manifests.get("sft_data"):
        counts = chats["counts"]
        rows = [
            [name, *(show(c[key]) for key in ("read", "kept", "cut", "tokens")), listed(c["dropped"])]
            for name, c in counts["sources"].items()
        ]
        said.append(table(["conversations", "read", "kept", "cut", "tokens", "dropped"], rows))
        rows = [
            [
                name,
                *(show(c[key]) for key in ("conversations", "tokens", "trained", "rows")),
                f"{c['packing_efficiency']:.2%}",
            ]
            for name, c in (("to train on", counts["train"]), ("held out", counts["val"]))
        ]
        said.append(table(["packed", "conversations", "tokens", "trained tokens", "rows", "used"], rows))
    if pairs := run.manifests.get("dpo_data"):
        counts = pairs["counts"]
        rows = [
            [name, *(show(c[key]) for key in ("read", "kept", "cut", "tokens")), listed(c["dropped"])]
            for name, c in counts["sources"].items()
        ]
        said.append(table(["pairs", "read", "kept", "cut", "tokens", "dropped"], rows))
        rows = [
            [name, *(show(c[key]) for key in ("pairs", "prompts", "tokens")), listed(c["kinds"])]
            for name, c in (("to train on", counts["train"]), ("held out", counts["val"]))
        ]
        said.append(table(["", "pairs", "prompts", "tokens", "kinds"], rows))
    return said or ["The model came without them."]


def listed(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {rule}" for rule, n in dropped.items()) or "nothing"


def training(run: Run, name: str, pictures: dict[str, bytes]) -> list[str]:
    records, said = run.metrics.get(name, []), []
    counts = run.finals.get(name, {}).get("counts", {})
    if not records:
        return ["Nothing is known here of its training."]
    best = min(((r["val_loss"], r["step"]) for r in records if finite(r.get("val_loss"))), default=None)
    speeds = [r["tokens_per_second"] for r in records if finite(r.get("tokens_per_second"))]
    facts = {
        "steps": f"{counts['step']:,} of {counts.get('steps', counts['step']):,}" if counts else "",
        "logged up to": f"step {records[-1]['step']:,}" if records[-1]["step"] != counts.get("step") else "",
        "tokens a parameter": show(records[-1].get("tokens_per_parameter", "")),
        "best validation loss": f"{best[0]:.4f} at step {best[1]:,}" if best else "never evaluated",
        "tokens a second": f"{statistics.median(speeds):,.0f}, the median of what was logged" if speeds else "",
        "steps skipped": show(records[-1].get("skipped", "")),
        "ran on": counts.get("machine", "not recorded"),
    }
    if chosen := run.finals.get(name, {}).get("config", {}).get("loss"):
        facts["loss"] = ", ".join(f"{key} {show(given)}" for key, given in chosen.items() if key != "type")
    said.append(table([name, ""], [[key, text] for key, text in facts.items() if text]))
    points = [r for r in records if "val_loss" in r] or records
    points = [points[round(i * (len(points) - 1) / 11)] for i in range(12)] if len(points) > 12 else points
    used = {key: label for key, label in LOGGED.items() if any(key in r for r in points)}
    said.append(table(list(used.values()), [[show(r.get(key, "")) for key in used] for r in points]))
    if name in pictures:
        said.append(f"![Loss, learning rate, gradient norm and speed of {name}](plots/{name}.png)")
        said.append(
            "As logged, nothing smoothed. The highest hundredth of the norms and speeds may lie above their axes."
        )
    return said


# -------------------------------------------------------------------------------------------------------------- samples


def samples(run: Run) -> list[str]:
    """What each stage has written, side by side: none of it selected."""
    config = run.manifests["eval"]["config"].get("eval", {})
    settings = ", ".join(f"{key} {given}" for key, given in config.items() if key != "type")
    said = [f"All that was generated, none of it selected. Settings: {settings}."]
    for task, head in WRITTEN.items():
        found = {name: texts[task] for name, texts in run.generations.items() if texts.get(task)}
        if not found:
            continue
        said.append(f"### {head}")
        if task == "smoke":
            said += smoke(found)
            continue
        for i, each in enumerate(next(iter(found.values()))):
            seed = f", seed {each['seed']}" if "seed" in each else ""
            said += [f"{i + 1}{seed}:", block(each["prompt"].rstrip("\n"))]
            for name, texts in found.items():
                own = texts[i]
                known = {k.replace("_", " "): show(v) for k, v in own.items() if number(v) and k not in FLAGS}
                notes = [f"{key} {text}" for key, text in known.items()]
                if "ended" in own:
                    notes.append("ended by itself" if own["ended"] else "cut at the greatest length")
                notes += ["with a mark of the template"] * own.get("marked", False)
                said.append(f"After {name}" + f" ({', '.join(notes)})" * bool(notes) + ":")
                said.append(block(own.get("answer", own.get("continuation"))))
            if "truth" in each:
                said += ["What stands there:", block(each["truth"])]
    return said


def smoke(found: dict[str, list[dict]]) -> list[str]:
    """For each stage a table of which rule each answer keeps, then all of the answers."""
    first, word = next(iter(found.values())), {True: "pass", False: "FAIL", None: "–"}
    said, lines = [], []
    for name, texts in found.items():
        rules = list(dict.fromkeys(rule for each in texts for rule in each["rules"]))
        rows = []
        for i, each in enumerate(texts, start=1):
            kept = [each["rules"].get(rule, {}).get("passed") for rule in rules]
            rows.append([str(i), each["category"], *(word[k] for k in (*kept, each["passed"]))])
        said.append(table([name, "category", *rules, "all"], rows))
    for i, prompt in enumerate(first):
        lines += [f"{i + 1}. {prompt['category']}, seed {prompt['seed']}", f"? {prompt['prompt']}"]
        for name, texts in found.items():
            each = texts[i]
            lines += [f"{name}: {word[each['passed']]}", "> " + (each["answer"] or "(nothing)").replace("\n", "\n  ")]
            broken = {rule: r for rule, r in each["rules"].items() if not r["passed"]}
            lines += [f"{rule}: {r['rule']}; found {r['found']}" for rule, r in broken.items()]
        lines.append("")
    said.append("Each prompt (?) with every stage's answer (>), and the rules that it breaks with what was found:")
    return [*said, block("\n".join(lines[:-1]))]


# ------------------------------------------------------------------------------------------------------ the small print


def provenance(run: Run) -> list[str]:
    commands = [manifest["counts"].get("command", run.commands[name]) for name, manifest in run.manifests.items()]
    commands.append(run.experiment.command("report"))
    versions, machines = {}, {}
    for name, manifest in run.manifests.items():
        text = ", ".join(f"{package} {version}" for package, version in manifest.get("versions", {}).items())
        versions.setdefault(text, []).append(name)
        if name in (*TRAINED, "eval"):
            machines.setdefault(manifest["counts"].get("machine", "not recorded"), []).append(name)
    said = ["Commands:", "\n".join(f"    {visible(command)}" for command in commands)]
    for head, found in (("Versions", versions), ("Hardware", machines)):
        said += [f"{head}:", block("\n".join(f"{', '.join(names)}: {text}" for text, names in found.items()))]
    rows = []
    for name in dict.fromkeys([*run.manifests, *run.finals]):
        directory = os.path.relpath(run.directories[name], run.home)
        final, manifest = run.finals.get(name), run.manifests.get(name)
        places = [(directory, manifest)] if manifest and manifest != final else []
        for place, about in [*places, (f"{directory}/final", final)] if final else places:
            files = {"manifest.json": about["sha256"]} | {
                f: d["sha256"] for f, d in about["wrote"].items() if f in SHOWN
            }
            rows += [[f"{place}/{file}", digest] for file, digest in files.items()]
    data = {(t, e["data"]): None for entries in run.results.values() for t, e in entries.items() if "data" in e}
    rows += [[f"data of {task}", digest] for task, digest in data]
    said.append("A manifest's digest is of what it says, and it has the digest of every file of its directory:")
    return [*said, table(["", "SHA-256"], rows)]


def limits(run: Run) -> list[str]:
    tasks, corpus = run.tasks(), run.manifests.get("corpus", {}).get("config", {})
    entries = {t: e for name in run.results for t in tasks if (e := measured(run.results[name], t))}
    cut = [f"{t} {e['truncated']:,}" for t, e in entries.items() if e.get("truncated")]
    choices = any("accuracy" in e for e in entries.values())
    checked = ", ".join(source["name"] for source in corpus.get("decontaminate", []))
    apart = "No evaluation set was looked for in the training text: it may hold items of one."
    if checked:
        apart = (
            f"Texts that share {corpus['decontaminate_ngram']} words in a row with {checked} were dropped; "
            "other evaluation sets were not looked for."
        )
    said = [
        "One training run, one seed. ± is of sampling the items; another seed moves the numbers too, by how "
        "much was not measured.",
        "Perplexity is per token: it compares models of one tokenizer only. Bits a byte compare on the same text only.",
        "Held-out documents are of the corpus that the model was trained on: other text will cost it more."
        if corpus
        else "What the model was trained on is not known here.",
        "During training a part of the held-out text is read (`eval_rows`), in the evaluation all of it, up to "
        "`validation_tokens`.",
        apart,
        "Multiple choice compares how likely the given answers are; it shows no skill in a conversation." * choices,
        "A p-value is of one task alone: of twenty without any effect one falls below 0.05." * choices,
        f"Items longer than the context lost their beginning: {', '.join(cut)}." if cut else "",
        "The short prompts are few, and their rules look at form more than at truth." * ("smoke" in entries),
        "A pair is won by what the model finds likelier than before, not by what it writes."
        * ("preference" in entries),
        "Distinct n-grams and repetition count words; they do not see sense." * ("prompts" in entries),
        "Times and tokens a second are of this machine, with whatever else ran on it.",
    ]
    return ["\n".join(f"- {each}" for each in said if each)]


def following(run: Run) -> str:
    taught = "sft" in run.finals
    use, here = "chat" if taught else 'generate "Return the"', Path(sys.executable)
    python = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else "python"
    return f"""    {python} serve.py {run.experiment.path} {use}
    {python} serve.py {run.experiment.path} api   # a page to {"chat" if taught else "write"} on, and an HTTP API
    {python} train.py configs/tiny.py   # 23 million parameters; Ctrl-C saves, the same command goes on
    {python} train.py configs/mine.py   # your own text: README.md shows the ten lines of that config"""
