"""Tokenizers of other models: a tokenizer.json, read by the `tokenizers` library, with its chat template."""

import functools
import itertools
import json
import re
from collections.abc import Sequence

import numpy as np

from cli import UserError, extra


class HuggingFace:
    """A tokenizer.json (BPE or Unigram) behind the interface of `tokenizer.Tokenizer`."""

    file = "tokenizer.json"

    # sha256: the digest of tokenizer.json, its identity. settings: tokenizer_config.json as `convert.py from-hf` wrote
    # it: the texts of bos and eos, the ids that end an answer, and the chat template in Jinja, or None.

    def __init__(self, content: bytes, sha256: str, settings: dict):
        library = extra("tokenizers", "tokenizers", "the tokenizer of an imported model")
        try:
            described = json.loads(content) | {"truncation": None, "padding": None}
            if (kind := described["model"].get("type")) not in ("BPE", "Unigram"):
                raise ValueError(f"its model is {kind}; expected BPE or Unigram")
            self.whole = library.Tokenizer.from_str(json.dumps(described))
            self.inner = library.Tokenizer.from_str(json.dumps(without_prefix(described)))
        except Exception as error:  # the library raises plain Exceptions
            raise UserError(f"tokenizer.json cannot be used: {error}") from None
        for pieces in (self.whole, self.inner):
            pieces.encode_special_tokens = True  # "<|im_end|>" in a text is spelt in pieces that are not special
        self.content, self.sha256, self.settings = content, sha256, settings
        self.byte_level = b"ByteLevel" in content
        self.vocab_size = 1 + max(self.whole.get_vocab().values())
        self.eos = self.whole.token_to_id(settings["eos_token"] or "")
        self.bos = self.whole.token_to_id(settings["bos_token"]) if settings["bos_token"] else self.eos
        self.ends = tuple(dict.fromkeys([self.eos, *settings["ends"]]))
        if not all(isinstance(id, int) and 0 <= id < self.vocab_size for id in (self.bos, *self.ends)):
            named = f"bos_token {settings['bos_token']!r}, eos_token {settings['eos_token']!r}, ends {self.ends[1:]}"
            raise UserError(f"the model's files name {named}; tokenizer.json lacks one of these")
        self.control, self.added = {}, {}
        for id, token in self.whole.get_added_tokens_decoder().items():
            (self.control if token.special else self.added)[token.content] = id
            if token.special and (token.lstrip or token.rstrip):
                raise UserError(f"the special token {token.content} takes the white space beside it; not supported")
        names = sorted(self.control, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        full, plain = self.whole.encode("x").ids, self.encode("x")
        self.opening = full[: len(full) - len(plain)]  # the ids before every text
        if full != self.opening + plain:
            raise UserError("tokenizer.json adds ids after a text; expected a tokenizer of a causal language model")
        # Some tokenizers put a space only at the start of a text, others also after every special token.
        after = self.recognise(f"{settings['eos_token']}x")[1:]
        self.prefixed = after == plain != self.encode("x", begins=False)
        if self.prefixed and self.added:
            raise UserError(f"the added token {min(self.added)} is not special and cuts a text; not supported")
        self.anchor = self.encode("x", begins=False)
        self.anchor_text = self.whole.decode(self.anchor)
        self.problem = self.try_template() if settings["chat_template"] else ""

    def recognise(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are recognised."""
        self.whole.encode_special_tokens = False
        ids = self.whole.encode(text, add_special_tokens=False).ids
        self.whole.encode_special_tokens = True
        return ids

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """The ids of a text, without special tokens. begins: False if the text continues another."""
        return (self.whole if begins else self.inner).encode(text, add_special_tokens=False).ids

    def encode_array(self, text: bytes, begins: bool = True) -> np.ndarray:
        """The ids of a text in UTF-8, int32."""
        return np.array(self.encode(text.decode(), begins), np.int32)

    def decode(self, ids: Sequence[int], begins: bool = True) -> str:
        """The text of ids; broken byte sequences give U+FFFD. begins: False if the ids continue a text."""
        ids = [id for id in ids if id < self.vocab_size]
        if begins:
            return self.whole.decode(ids)
        return self.whole.decode(self.anchor + ids)[len(self.anchor_text) :]  # keeps a space at the beginning

    def spelling(self, id: int) -> tuple[str, bytes]:
        """A token's text, U+FFFD where it is a part of a character, and its bytes."""
        name = self.whole.id_to_token(id) or ""
        if name in self.control:
            return name, name.encode()
        if re.fullmatch("<0x[0-9A-F]{2}>", name):
            content = bytes.fromhex(name[3:5])
        elif self.byte_level and set(name) <= byte_letters().keys():
            content = bytes(byte_letters()[letter] for letter in name)
        else:
            content = name.replace("▁", " ").encode()
        return content.decode(errors="replace"), content

    # ---------------------------------------------------------------------------------------------------- chat template

    def render(self, messages: Sequence[dict], ask: bool) -> tuple[list[int], list[bool]]:
        """The ids of a conversation by the chat template, and for each id True if it is trained."""
        # messages: {"role", "content"}. ask: end where an answer begins. A special token spelt in a message must stay
        # text: a mark, a character that no message has, breaks it until the text is cut at the template's own tokens.
        used = set().union(*(message["content"] for message in messages))
        mark = next(chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)
        broken = []
        for message in messages:
            content = message["content"]
            while self.pattern.search(content):  # again: a special token may lie inside another
                content = self.pattern.sub(lambda match: match[0][0] + mark + match[0][1:], content)
            broken.append(message | {"content": content})
        text = self.fill(broken, ask)
        try:
            bounds = self.answers(broken, text)
        except UserError:
            if not ask:
                raise
            bounds = [0]  # nothing is trained, so the answers need not be found
        ids, trained = [], []
        begins = True  # also after a special token, if the tokenizer puts a space there
        for number, (first, last) in enumerate(itertools.pairwise([*bounds, len(text)])):
            answer = number % 2 == 1  # every second part between bounds is an answer
            learnt, start = answer, first
            for match in [*self.pattern.finditer(text, first, last), None]:
                end = match.start() if match else last
                new = self.encode(text[start:end].replace(mark, ""), begins) if end > start else []
                begins = begins and end == start
                if match:
                    new.append(self.control[match[0]])
                    start, begins = match.end(), self.prefixed
                ids += new
                trained += [learnt] * len(new)
                learnt = learnt and match is None  # the first special token ends the answer
        return ids, trained

    def try_template(self) -> str:
        """Why the chat template cannot be used for fine-tuning; "" if it can. Adds its end piece to `ends`."""
        try:
            talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
            ids, trained = self.render(talk, ask=False)
        except UserError as error:
            return str(error)
        last = [id for id, learnt in zip(ids, trained, strict=True) if learnt][-1]
        if last in self.control.values():
            self.ends = tuple(dict.fromkeys([*self.ends, last]))
        return ""

    def answers(self, messages: Sequence[dict], text: str) -> list[int]:
        """0, then where each answer begins and ends in the text of a conversation, its end piece included."""
        bounds, problem = [0], ""
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                for before in (self.fill(messages[:number], True), self.fill(messages[: number + 1], False)):
                    bounds.append(len(before))
                    if not text.startswith(before):
                        problem = "does not write turns one after another"
                if message["content"] and self.pattern.match(text, bounds[-2]):
                    problem = "has no generation prompt"
        if problem:
            raise UserError(f'the chat template {problem}, so answers cannot be found in it; set template="instruct"')
        return bounds

    def fill(self, messages: Sequence[dict], ask: bool) -> str:
        """The text of a conversation by the chat template."""
        settings = self.settings
        names = {"bos_token": settings["bos_token"] or "", "eos_token": settings["eos_token"], "tools": None}
        try:
            form = compiled(settings["chat_template"])
            return form.render(messages=messages, add_generation_prompt=ask, documents=None, **names)
        except Exception as error:  # the template is a program: it may raise anything
            raise UserError(f'the chat template cannot be used: {error}; set template="instruct"') from None


@functools.cache
def compiled(template: str):
    """A chat template with the functions of transformers, except today's date: ids depend only on the messages."""
    import jinja2.ext
    import jinja2.sandbox

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [jinja2.ext.loopcontrols]}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(**options)
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    # `generation` marks answers for trainers; here they are found by rendering.
    template = re.sub(r"(\{%-?\s*)generation(\s*-?%\})", r"\1if true\2", template)
    return environment.from_string(re.sub(r"(\{%-?\s*)endgeneration(\s*-?%\})", r"\1endif\2", template))


def without_prefix(value):
    """A tokenizer.json without the space that it puts before a text."""
    if isinstance(value, list):
        return [without_prefix(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    value = {key: without_prefix(item) for key, item in value.items()}
    if value.get("type") == "Metaspace":
        value["prepend_scheme"] = "never"
    elif value.get("type") == "ByteLevel":
        value["add_prefix_space"] = False
    return value


@functools.cache
def byte_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level piece stands for (GPT-2): itself if printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}
