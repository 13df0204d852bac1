"""What a model makes of beginnings it has not seen, beside how they really go on."""

from data.pack import Packed
from eval import EvalConfig
from model import Transformer
from tokenizer import Tokenizer


def continuations(model: Transformer, packed: Packed, tokenizer: Tokenizer, config: EvalConfig) -> list[dict[str, str]]:
    """`prompt`, `continuation` and `truth` for held-out documents, evenly spaced among those long enough.

    None is chosen by what the model says: the documents and the seed are fixed beforehand.
    """
    length = config.prompt_tokens + config.new_tokens
    documents = [ids.tolist() for ids in packed.documents() if len(ids) > length]
    wanted = min(config.continuations, len(documents))
    examples = []
    for i in range(wanted):
        ids = documents[i * len(documents) // wanted]
        prompt, truth = ids[: config.prompt_tokens], ids[config.prompt_tokens : length]
        new = model.generate(
            [tokenizer.bos, *prompt],  # a document begins here
            config.new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed + i,
            stop=(tokenizer.eos,),
        )
        texts = {"prompt": prompt, "continuation": new, "truth": truth}
        examples.append({name: tokenizer.decode(ids, begins=name == "prompt") for name, ids in texts.items()})
    return examples
