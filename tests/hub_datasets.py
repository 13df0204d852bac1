"""Small copies of the public datasets that the configs name: layout, subsets, splits and columns as on the Hub.

They follow the cards and file lists of the originals, as far as those could be read in November 2026. The texts are
made here.
"""

import gzip
import io
import itertools
import json
import random

import pyarrow
import pyarrow.parquet

from tests.eval.test_tasks import RECORDS

NOUNS = """river house garden winter letter captain village teacher morning market engine harbour mountain window
picture question journey neighbour doctor farmer kitchen bridge forest station summer island lamp paper story machine"""
VERBS = "found carried remembered followed described watched built opened crossed repaired painted studied"
KINDS = "quiet old narrow bright distant heavy careful broken famous early wooden small empty pleasant strange"
PEOPLE = "they we people he she it I you"
LINKS = ["and then", "but", "because", "while", "so that", "after that", "before", "although"]


def prose(source: random.Random, sentences: int) -> str:
    """English of a kind: it passes the rules of C4 and Gopher."""
    nouns, verbs, kinds, people, lines = NOUNS.split(), VERBS.split(), KINDS.split(), PEOPLE.split(), []
    for _ in range(sentences):
        parts = []
        for person in source.sample(people, 2):
            kind, other = source.sample(kinds, 2)
            first, second = source.sample(nouns, 2)
            parts.append(f"{person} {source.choice(verbs)} the {kind} {first} of the {other} {second}")
        parts.append(f"{source.choice(people)} {source.choice(verbs)} that {source.choice(nouns)} with them")
        sentence = f"{parts[0]} {source.choice(LINKS)} {parts[1]} {source.choice(LINKS)} {parts[2]}."
        lines.append(sentence[0].upper() + sentence[1:])
    return " ".join(lines)


def parquet(records: list[dict], **types) -> bytes:
    """types: of columns whose type is not the one that pyarrow infers."""
    table = pyarrow.Table.from_pylist(records)
    for name, kind in types.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, pyarrow.field(name, kind), table[name].cast(kind))
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, row_group_size=20)
    return content.getvalue()


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def gz(records: list[dict]) -> bytes:
    return gzip.compress(lines(records), mtime=0)


def card(configs: dict[str, dict[str, str]], default: str = "") -> bytes:
    """README.md. configs: subset -> split -> pattern of its files."""
    text = "---\nconfigs:\n"
    for name, splits in configs.items():
        text += f"- config_name: {name}\n  data_files:\n"
        for split, path in splits.items():
            text += f"  - split: {split}\n    path: {path}\n"
        text += "  default: true\n" * (name == default)
    return f"{text}---\n# A dataset\n".encode()


def parts(*names: str, folder: str = "data/") -> dict[str, str]:
    return {name: f"{folder}{name}-*" for name in names}


def texts(source: random.Random, count: int) -> list[str]:
    return ["\n".join(prose(source, 4) for _ in range(source.randint(2, 4))) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------- pretraining


def c4(source: random.Random) -> dict[str, bytes]:
    configs, files = {}, {}
    for name in ("en", "en.noblocklist", "en.noclean", "realnewslike"):
        configs[name] = {split: f"{name}/c4-{split}.*.json.gz" for split in ("train", "validation")}
    for path in ("en/c4-train.00000-of-01024", "en/c4-train.00001-of-01024", "en/c4-validation.00000-of-00008"):
        records = []
        for number, text in enumerate(texts(source, 60)):
            url = f"https://example.com/{path[-3:]}/{number}"
            records.append({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": url})
        files[f"{path}.json.gz"] = gz(records)
    files["realnewslike/c4-train.00000-of-00512.json.gz"] = gz(records)
    return files | {"README.md": card(configs), "multilingual/c4-af.tfrecord-00000-of-00064.json.gz": gz(records[:1])}


def fineweb_edu(source: random.Random) -> dict[str, bytes]:
    configs, files = {"default": {"train": "data/*/*"}}, {}
    for name in ("10BT", "100BT", "350BT"):
        configs[f"sample-{name}"] = {"train": f"sample/{name}/*"}
    configs["CC-MAIN-2013-20"] = {"train": "data/CC-MAIN-2013-20/*"}
    paths = ["sample/10BT/000_00000", "sample/10BT/001_00000", "sample/100BT/000_00000"]
    for path in [*paths, "data/CC-MAIN-2013-20/train-00000-of-00014"]:
        records = []
        for number, text in enumerate(texts(source, 60)):
            record = {"text": text, "id": f"<urn:uuid:{number}>", "dump": "CC-MAIN-2013-20", "url": "http://a.com"}
            record |= {"file_path": "s3://commoncrawl/a.warc.gz", "language": "en", "language_score": 0.97}
            records.append(record | {"token_count": 120, "score": 3.1, "int_score": 3})
        files[f"{path}.parquet"] = parquet(records)
    return files | {"README.md": card(configs)}


def wikipedia(source: random.Random) -> dict[str, bytes]:
    configs, files = {}, {}
    for name in ("20231101.ab", "20231101.en", "20231101.simple"):
        configs[name] = parts("train", folder=f"{name}/")
        shards = 2 if name.endswith("en") else 1
        for shard in range(shards):
            records = []
            for number, text in enumerate(texts(source, 60)):
                url = f"https://en.wikipedia.org/wiki/{number}"
                records.append({"id": str(number), "url": url, "title": source.choice(NOUNS.split()), "text": text})
            files[f"{name}/train-{shard:05d}-of-{shards:05d}.parquet"] = parquet(records)
    return files | {"README.md": card(configs)}


def gutenberg(source: random.Random) -> dict[str, bytes]:
    files = {"README.md": b"---\nlicense: mit\nlanguage:\n- en\n---\n# Project Gutenberg\n"}
    for shard, digest in enumerate(("f5fce855b93d2d02", "70aedec2128e42aa")):
        records = []
        for number in range(8):
            text = "\r\n\r\n".join(texts(source, 8))
            about = json.dumps({"text_id": number, "title": source.choice(NOUNS.split()), "language": "en"})
            records.append({"TEXT": text, "SOURCE": "Project Gutenberg", "METADATA": about})
        files[f"data/train-{shard:05d}-of-00002-{digest}.parquet"] = parquet(records)
    return files


# ---------------------------------------------------------------------------------------------- conversations and pairs


def answer(source: random.Random) -> str:
    return prose(source, source.randint(1, 2))


def oasst1(source: random.Random) -> dict[str, bytes]:
    """Each tree's messages stand together, parents first; of two answers the second is ranked best."""
    files = {"README.md": b"---\nlicense: apache-2.0\n---\n# OASST1\n"}
    labels = pyarrow.struct({"name": pyarrow.list_(pyarrow.string()), "count": pyarrow.list_(pyarrow.int32())})
    for split, digest, trees in (("train", "b42a775f407cee45", 60), ("validation", "134b8fd0c89408b6", 4)):
        rows = []
        for tree in range(trees):
            root = f"{split}-{tree}"
            ends = [(root, None, None), (f"{root}-a", root, 1), (f"{root}-b", root, 0)]
            ends += [(f"{root}-c", f"{root}-b", None), (f"{root}-d", f"{root}-c", 0)]
            for number, (id, parent, rank) in enumerate(ends):
                role = "assistant" if number in (1, 2, 4) else "prompter"
                row = {"message_id": id, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T14:23:50"}
                row |= {"text": answer(source), "role": role, "lang": "de" if tree % 10 == 9 else "en"}
                row |= {"review_count": 3, "review_result": True, "deleted": False, "rank": rank, "synthetic": False}
                row |= {"model_name": None, "detoxify": {"toxicity": 0.001, "insult": 0.002}, "message_tree_id": root}
                rows.append(row | {"tree_state": "ready_for_export", "emojis": {"name": ["+1"], "count": [1]}})
        kinds = {"model_name": pyarrow.string(), "rank": pyarrow.int32(), "emojis": labels}
        files[f"data/{split}-00000-of-00001-{digest}.parquet"] = parquet(rows, **kinds)
    return files | {"2023-04-12_oasst_ready.messages.jsonl.gz": gz(rows[:5])}


def wizardlm(source: random.Random) -> dict[str, bytes]:
    records = [{"instruction": f"{prose(source, 1)} Why?", "output": answer(source)} for _ in range(120)]
    return {"README.md": b"---\nlicense: mit\n---\n", "alpaca_evol_instruct_70k.json": json.dumps(records).encode()}


def openorca(source: random.Random) -> dict[str, bytes]:
    files = {"README.md": b"---\nlicense: mit\npretty_name: OpenOrca\n---\n"}
    for name, prefix in (("1M-GPT4-Augmented", "niv"), ("3_5M-GPT3_5-Augmented", "flan")):
        records = []
        for number in range(60):
            record = {"id": f"{prefix}.{number}", "system_prompt": "You are an AI assistant." * (number % 2)}
            records.append(record | {"question": f"{prose(source, 1)} Who?", "response": answer(source)})
        files[f"{name}.parquet"] = parquet(records)
    return files


def orca_pairs(source: random.Random) -> dict[str, bytes]:
    records = []
    for number in range(120):
        record = {"system": "You are an AI assistant." * (number % 2), "question": f"{prose(source, 1)} When?"}
        records.append(record | {"chosen": answer(source), "rejected": answer(source)})
    return {"README.md": b"---\nlicense: apache-2.0\n---\n", "orca_rlhf.jsonl": lines(records)}


def hh_rlhf(source: random.Random) -> dict[str, bytes]:
    files = {"README.md": b"---\nlicense: mit\ntags:\n- human-feedback\n---\n"}
    for part in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"):
        for split, count in (("train", 40), ("test", 4)):
            records = []
            for number in range(count):
                before = f"\n\nHuman: {prose(source, 1)}\n\nAssistant: "
                record = {"chosen": before + answer(source), "rejected": before + answer(source)}
                if number % 20 == 19:  # as in the original, some part before their last answer
                    record["rejected"] = f"\n\nHuman: {prose(source, 1)}\n\nAssistant: No."
                records.append(record)
            files[f"{part}/{split}.jsonl.gz"] = gz(records)
    attempt = {"min_harmlessness_score_transcript": 0.1, "transcript": "\n\nHuman: Hi", "tags": None, "rating": 1.0}
    return files | {"red-team-attempts/red_team_attempts.jsonl.gz": gz([attempt])}


# ----------------------------------------------------------------------------------------------------------- evaluation


def evaluation(source: random.Random) -> dict[str, dict[str, bytes]]:
    """The datasets of `eval.tasks.PUBLISHED`. BLiMP has 67 subsets on the Hub."""
    article = ["", " = Ice = \n", "", " Ice is frozen . \n"]
    wikitext = [{"text": text} for text in article + [f" {line} \n" for line in texts(source, 4)[0].split("\n")]]
    tables = {  # dataset -> subset -> its records and their splits
        "Salesforce/wikitext": {"wikitext-103-raw-v1": [wikitext[:2]], "wikitext-2-raw-v1": [wikitext]},
        "google/boolq": {"default": [drop(RECORDS["boolq"], "title")]},
        "nyu-mll/blimp": {name: [RECORDS["blimp"] | {"UID": name}] for name in ("adjunct_island", "wh_island")},
        "allenai/ai2_arc": {name: [RECORDS["arc_easy"] | {"id": "a"}] for name in ("ARC-Challenge", "ARC-Easy")},
        "Rowan/hellaswag": {"default": [RECORDS["hellaswag"] | {"ind": 4, "split": "val", "source_id": "a"}]},
        "allenai/winogrande": {f"winogrande_{size}": [RECORDS["winogrande"]] for size in ("xs", "xl", "debiased")},
    }
    splits = {"google/boolq": ("train", "validation"), "nyu-mll/blimp": ("train",)}
    repositories = {}
    for name, subsets in tables.items():
        configs, files = {}, {}
        for subset, records in subsets.items():
            folder = "data/" if subset == "default" else f"{subset}/"
            configs[subset] = parts(*splits.get(name, ("test", "train", "validation")), folder=folder)
            for split in configs[subset]:
                rows = records[0] if isinstance(records[0], list) else records
                files[f"{folder}{split}-00000-of-00001.parquet"] = parquet(rows)
        repositories[name] = files | {"README.md": card(configs)}
    piqa = {f"piqa_{split}.parquet": parquet([RECORDS["piqa"]]) for split in ("test", "train", "validation")}
    return repositories | {"baber/piqa": piqa}


def drop(record: dict, name: str) -> dict:
    return {key: value for key, value in record.items() if key != name}


def all_of_them() -> dict[str, dict[str, bytes]]:
    """{dataset: {path: content}}, the same in every run."""
    makers = {
        "allenai/c4": c4,
        "HuggingFaceFW/fineweb-edu": fineweb_edu,
        "wikimedia/wikipedia": wikipedia,
        "sedthh/gutenberg_english": gutenberg,
        "OpenAssistant/oasst1": oasst1,
        "WizardLMTeam/WizardLM_evol_instruct_70k": wizardlm,
        "Open-Orca/OpenOrca": openorca,
        "Intel/orca_dpo_pairs": orca_pairs,
        "Anthropic/hh-rlhf": hh_rlhf,
    }
    seeds = itertools.count()
    repositories = {name: maker(random.Random(next(seeds))) for name, maker in makers.items()}
    return repositories | evaluation(random.Random(next(seeds)))
