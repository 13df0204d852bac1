"""What evaluation found, the stages side by side: tables for the report, of any task that results.json may hold."""

from eval.markdown import block, finite, number, show, table
from eval.run import Run, measured

MAIN = {"validation": "bits_per_byte", "wikitext2": "bits_per_byte", "smoke": "passed"}
MAIN |= {
    "prompts": "repetition",
    "continuations": "repetition",
    "preference": "win_rate",
    "everyday": "repetition",
    "answers": "loss",
}  # the metric that `stderr` and `baseline` are of, if not accuracy


def main_metric(task: str, entries) -> str:
    """The metric that a task's `stderr` and `baseline` are of: of one that is not known here, its first."""
    keys = [key for entry in entries if entry for key, given in entry.items() if number(given)]
    return MAIN.get(task) or ("accuracy" if "accuracy" in keys else next(iter(keys), ""))


def error_name(key: str, main: str) -> str:
    """Under which name an entry holds a metric's standard error: stderr_norm of accuracy_norm, say."""
    return "stderr" if key == main else key.replace(main, "stderr") if main and main in key else ""


def value(entry: dict, key: str, main: str) -> str:
    """A metric with its standard error, where it has one."""
    if key not in entry:
        return "–"
    error = entry.get(error_name(key, main))
    if not finite(error):
        return show(entry[key])
    return f"{show(entry[key])} ± {show(error) if 0 < error < 5e-4 else f'{error:.4f}'}"


def side(entry: dict, key: str) -> str:
    """On which side of its baseline an accuracy is; nothing where that was not tested."""
    if not all(finite(entry.get(name)) for name in (key, "baseline", "p_value")):
        return ""
    if entry["p_value"] >= 0.05:
        return " ="
    return " ↑" if entry[key] > entry["baseline"] else " ↓"


def evaluation(run: Run, pictures: dict[str, bytes]) -> list[str]:
    said, stages, tasks = [], list(run.results), run.tasks()
    rows, groups = [], {}
    for task in tasks:
        found = {name: measured(run.results[name], task) or {} for name in stages}
        main = main_metric(task, found.values())
        known = next(entry for entry in found.values() if entry)
        baseline, n = show(known.get("baseline", "–")), show(known.get("n", "–"))
        values = [value(e, main, main) + side(e, main) for e in found.values()]
        rows.append([task, main.replace("_", " "), *values, baseline, n])
        others = [key for key, given in known.items() if key not in ("stderr", "baseline", "n", main) and number(given)]
        own = {error_name(key, main) for key in others}
        if others := tuple(key for key in others if key not in own):
            groups.setdefault((main, others), []).append(task)
    if not tasks:
        return ["Nothing was measured.", *skipped(run)]
    said.append(table(["task", "metric", *stages, "baseline", "n"], rows))
    said.append(
        "± is one standard error over the items of a task; for bits per byte these are documents or articles, and n "
        "counts tokens; where all items score the same, it is as if two 0s and two 1s had been among them. The "
        "baseline is what needs no model: xz -9 for bits per byte, chance for accuracy, in boolq the commonest answer, "
        "an empty answer for smoke, how the documents really go on for continuations, for answers each token as "
        "frequent as in the training answers. Of answers, loss words and loss ends are the loss of their words and of "
        "the piece that ends them, marked the share of the model's own with a mark of the template in them. A pair of "
        "preference is won by the reward that a model implies beside the one that dpo begins from, for which all pairs "
        "are ties, 0.5 (of an earlier stage it says what later ones have changed); its errors are over prompts. Length "
        "matched weighs pairs so that the chosen answer is the longer one as often as not among those that differ as "
        "much; longer wins is what always taking the longer answer wins, likelier the share of pairs whose chosen "
        "answer is the likelier one, whatever the reference thinks. An accuracy is above its baseline (↑) or below (↓) "
        "at p < 0.05, or not to be told from it (=)."
    )
    if "evaluation" in pictures:
        said.append("![The same beside the baselines](plots/evaluation.png)")
    said += skipped(run)
    said.append("### Further numbers")
    for (main, keys), alike in groups.items():
        # One task has a column a stage; several of a kind have a table a stage, with a column a task, as many as fit.
        plans = [(alike[0], stages, [(name, alike[0]) for name in stages])]
        if len(alike) > 1:
            parts = [alike[i : i + 4] for i in range(0, len(alike), 4)]
            plans = [(name, own, [(name, task) for task in own]) for name in stages for own in parts]
        for title, heads, columns in plans:
            entries = [measured(run.results[name], task) or {} for name, task in columns]
            body = [[key.replace("_", " "), *(value(e, key, main) for e in entries)] for key in keys]
            said.append(table([title, *heads], body))
    return [*said, *breakdowns(run)]


def breakdowns(run: Run) -> list[str]:
    """A table for each part of an entry that is a table itself: BLiMP by field, smoke prompts by category."""
    said = []
    for task in run.tasks():
        found = [measured(entries, task) or {} for entries in run.results.values()]
        for key in dict.fromkeys(k for e in found for k, given in e.items() if isinstance(given, dict)):
            names = dict.fromkeys(name for e in found for name in e.get(key, {}))
            rows = [[name, *(part(e.get(key, {}).get(name)) for e in found)] for name in names]
            said.append(table([f"{task} {key.replace('_', ' ')}", *run.results], rows))
    return said


def part(given) -> str:
    """One cell of a breakdown: a share, or a metric with its error."""
    if not isinstance(given, dict):
        return "–" if given is None else show(given)
    return value(given, main_metric("", [given]), main_metric("", [given]))


def skipped(run: Run) -> list[str]:
    """Why a task was not measured, and the way to it: in the words of the results."""
    reasons = {}
    for name, entries in run.results.items():
        for task, entry in entries.items():
            if "skipped" in entry:
                reasons.setdefault((task, str(entry["skipped"])), []).append(name)
    lines = [f"{task} ({', '.join(names)}): {why}" for (task, why), names in reasons.items()]
    return ["Not measured:", block("\n".join(lines))] if lines else []
