"""LoRA: against peft, merged and not, what is trained and what is kept, and checkpoints of adapters."""

import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import checkpoint
import finetune
import lora
import stage
from cli import UserError
from lora import BLOCKS, TARGETS, LoRAConfig
from model import ModelConfig, Transformer
from optim import make_optimizers
from tests.test_model import build, relative
from trainer import TrainConfig

# Every projection but q and o is rectangular.
SHAPE = {"vocab_size": 96, "context_length": 24, "n_layers": 2, "d_model": 16}
SHAPE |= {"n_heads": 4, "n_kv_heads": 2, "d_ff": 40}
SMALL = LoRAConfig(rank=4, alpha=6.0, dropout=0.0)
TOKENS = torch.randint(96, (3, 24), generator=torch.Generator().manual_seed(0))
# Rows of several texts. The beginning of each text is not trained.
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([24], [7, 1, 16], [11, 13])])
TARGET_IDS = TOKENS.roll(-1, 1).masked_fill(POSITIONS < 3, -100)
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def base(seed: int = 0, tied: bool = False) -> Transformer:
    """Weights large enough that every part of the model shows in its logits."""
    return build(ModelConfig(**SHAPE, tie_embeddings=tied), seed).eval()


def adapted(seed: int = 1, config: LoRAConfig = SMALL, model: Transformer | None = None, name: str = "default"):
    """The base, or another model, with an adapter that is not zero."""
    model = base() if model is None else model
    lora.attach(model, config, name)
    draw = torch.Generator().manual_seed(seed)
    for layer in lora.layers(model).values():
        if name in layer.configs:
            layer.a[name].data.normal_(0, 0.5, generator=draw)
            layer.b[name].data.normal_(0, 0.5, generator=draw)
    return model


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def contents(model: Transformer) -> dict[str, bytes]:
    """The base's weights, byte for byte."""
    kept = {
        k.replace("frozen", "weight"): v for k, v in model.state_dict().items() if ".a." not in k and ".b." not in k
    }
    return {k: v.numpy().tobytes() for k, v in kept.items()}


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("targets", [TARGETS, BLOCKS, ("q", "v"), ("k", "head")], ids=",".join)
def test_peft_computes_the_same(targets, dtype, tolerance):
    """Logits, losses and gradients; peft's losses come from whole logits."""
    plain = base()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), lora_dropout=0.0, bias="none")
    theirs = inject_adapter_in_model(config, copy.deepcopy(plain)).to(dtype)
    ours = adapted(config=LoRAConfig(rank=4, alpha=6.0, dropout=0.0, targets=targets), model=plain).to(dtype)
    others = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    pairs = {}
    for name, layer in lora.layers(ours).items():
        pairs[f"{name}.a"] = layer.a["default"], others.pop(f"{name}.lora_A.default.weight")
        pairs[f"{name}.b"] = layer.b["default"], others.pop(f"{name}.lora_B.default.weight")
    assert not others
    assert {p for p in ours.parameters() if p.requires_grad} == {p for p, _ in pairs.values()}
    for mine, other in pairs.values():
        other.data.copy_(mine.data)
    assert relative(logits(ours), logits(theirs)) < tolerance
    assert relative(logits(ours), logits(base().to(dtype))) > 0.1
    for options in ({}, {"positions": POSITIONS}):
        mine, other = ours(TOKENS, TARGET_IDS, **options), theirs(TOKENS, **options)
        other = F.cross_entropy(other.flatten(0, 1), TARGET_IDS.flatten())
        assert relative(mine, other) < tolerance
        ours.zero_grad(), theirs.zero_grad()
        mine.backward(), other.backward()
        for name, (mine, other) in pairs.items():
            assert mine.grad.norm() > 0
            assert relative(mine.grad, other.grad) < 2 * tolerance, name


@TIED
def test_merged_it_computes_the_same_and_unmerged_the_base_is_back_bit_for_bit(tied):
    model, before = base(tied=tied), contents(base(tied=tied))
    apart = logits(adapted(model=model))
    assert ("head" in lora.layers(model)) != tied
    for times in (1, 2):
        for _ in range(times):
            lora.merge(model)
        assert relative(logits(model), apart) < 1e-5
        assert contents(model) == before  # the base is saved, with the adapter beside it
        lora.unmerge(model)
        assert torch.equal(logits(model), apart)
        assert contents(model) == before


def test_a_fresh_adapter_changes_nothing_bit_for_bit():
    model, before = base(), logits(base())
    lora.attach(model, LoRAConfig())
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.train()), before)
    for layer in lora.layers(model).values():
        bound = 1 / math.sqrt(layer.in_features)  # as nn.Linear draws its weights
        assert 0.9 * bound < layer.a["default"].abs().max() <= bound
        assert not layer.b["default"].any()


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_without_the_adapter_the_model_is_the_base_bit_for_bit(merged):
    model, before = adapted(), logits(base())
    loss, plain_loss = model(TOKENS, TARGET_IDS), base()(TOKENS, TARGET_IDS)
    apart = logits(model)
    if merged:
        lora.merge(model)
    with lora.without(model):
        assert torch.equal(logits(model), before)
        assert torch.equal(model(TOKENS, TARGET_IDS), plain_loss)
    with pytest.raises(ZeroDivisionError), lora.without(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), apart)
    assert torch.equal(model(TOKENS, TARGET_IDS), loss)
    assert not torch.equal(loss, plain_loss)
    lora.use(model, None)
    assert torch.equal(logits(model), before)
    lora.merge(model)
    assert torch.equal(logits(model), before)


def test_each_of_several_adapters_gives_what_it_gives_alone():
    few = LoRAConfig(rank=2, alpha=1.0, dropout=0.0, targets=("q", "down"))
    other = LoRAConfig(rank=8, alpha=16.0, dropout=0.0, targets=("head", "down", "up", "k"))
    alone, model = {None: logits(base())}, base()
    for seed, (name, config) in enumerate({"all": SMALL, "few": few, "other": other}.items()):
        alone[name] = logits(adapted(seed, config))
        adapted(seed, config, model, name)
        assert torch.equal(logits(model), alone[name])
        assert {parameter.rpartition(".")[2] for parameter in trained(model)} == {name}
    for name in ("few", "all", "other", None, "all", "other", "few", None):
        lora.use(model, name)
        assert torch.equal(logits(model), alone[name])
        lora.merge(model)
        assert relative(logits(model), alone[name]) < 1e-5
    with pytest.raises(KeyError, match="no adapter 'gone'"):
        lora.use(model, "gone")
    with pytest.raises(ValueError, match="name is 'few'; expected one without a dot that no other adapter has"):
        lora.attach(model, few, "few")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_trains_the_adapter_and_leaves_the_base_bit_for_bit(precision, optimizer):
    model = adapted(config=LoRAConfig(rank=4, alpha=6.0, dropout=0.05)).train()
    before, was = contents(model), {name: p.clone() for name, p in model.named_parameters()}
    config = TrainConfig(steps=1, batch_size=1, learning_rate=1e-2, weight_decay=0.1, optimizer=optimizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        model(TOKENS, TARGET_IDS, positions=POSITIONS).backward()
    for step in make_optimizers(model, config):
        step.step()
    assert contents(model) == before
    assert len(trained(model)) == 2 * (2 * 7 + 1)  # A and B of seven layers in two blocks, and of the head
    for name, p in model.named_parameters():
        assert (name in trained(model)) == (p.grad is not None) == (not torch.equal(p, was[name])), name
        assert p.dtype == torch.float32


def test_the_end_piece_gets_the_end_of_a_text_in_the_frozen_weight():
    """Once only, also while an adapter of the head is active."""
    model, rows = adapted(), base().head.weight
    for _ in range(2):
        lora.init_end_piece(model, end=3, start=2, eos=1)
    expected = rows[1] + (rows[3] - rows[2])
    with lora.without(model):
        assert torch.equal(model.head.weight[3], expected)
        assert torch.equal(model.head.weight[:3], rows[:3])


@pytest.mark.parametrize(("p", "dtype"), [(0.05, torch.bfloat16), (0.5, torch.float64), (0.9, torch.float64)])
def test_dropout_sets_a_share_of_p_to_0_independently_and_keeps_the_rest(dtype, p):
    torch.manual_seed(0)
    x = (torch.rand(3, 111, 333).to(dtype) + 0.5).requires_grad_()  # an odd number of elements, none is 0
    y = lora.dropped(x, p)
    zero, n = y == 0, x.numel()
    assert y.dtype == dtype
    assert abs(int(zero.sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert torch.equal(y[~zero], x[~zero])
    y.backward(torch.full_like(y, 3.0))
    assert torch.equal(x.grad, 3 * (~zero).to(dtype))
    zero = (lora.dropped(torch.ones(400_001), p) == 0).double()
    for apart in (1, 2, 3, 4, 5, 8, 1000):
        both = float((zero[apart:] * zero[:-apart]).mean())
        assert both == pytest.approx(p**2, abs=5 * math.sqrt(p**2 / 200_000))


def test_only_the_adapters_input_is_dropped_and_only_in_training():
    model = adapted(config=LoRAConfig(rank=4, alpha=6.0, dropout=0.5))
    assert torch.equal(logits(model), logits(adapted()))
    model.train()
    assert not torch.equal(logits(model), logits(adapted()))
    with lora.without(model):
        assert torch.equal(logits(model), logits(base()))
    x, layer = torch.randn(5, 16), model.blocks[0].attn.k
    torch.manual_seed(0)
    dropped = lora.dropped(x, 0.5)
    torch.manual_seed(0)
    by_hand = x @ layer.frozen.T + 6 / 4 / 0.5 * dropped @ layer.a["default"].T @ layer.b["default"].T
    torch.testing.assert_close(layer(x), by_hand)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # PyTorch's own use
def test_compiled_dropout_does_not_break_the_graph_and_two_layers_drop_different_inputs():
    part = adapted(config=LoRAConfig(rank=4, alpha=6.0, dropout=0.5)).train().blocks[0].mlp
    x = torch.randn(2, 24, 16, requires_grad=True)
    assert torch._dynamo.explain(part)(x).graph_break_count == 0
    one, two, ones = torch.ones(1), torch.ones(1), torch.ones(64, 64, requires_grad=True)
    both = torch.compile(
        lambda x, one, two: (lora.dropped(x, 0.5, one), lora.dropped(x, 0.5, two)),
        fullgraph=True,
        backend="aot_eager_decomp_partition",  # merges equal calls, as inductor does
    )
    first, second = both(ones, one, two)
    assert not torch.equal(first, second)


WRONG = [("rank", 0), ("alpha", 0.0), ("alpha", math.nan), ("dropout", 1.0), ("targets", ()), ("targets", ("q", "q"))]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_wrong_field_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field} (is|are) "):
        LoRAConfig(**{field: value})


def test_targets_that_the_model_lacks_are_named_with_the_layers_that_it_has():
    model = base()
    with pytest.raises(UserError, match="targets names 'wq'; the model has q, k, v, o, gate, up, down, head: set"):
        lora.attach(model, LoRAConfig(targets=("wq", "k")))
    assert not lora.layers(model)
    assert trained(model) == set(dict(model.named_parameters()))


def test_an_adapter_in_float32_on_a_base_in_bfloat16_and_with_biases():
    model = base().bfloat16()
    for block in model.blocks:
        block.mlp.down.bias = nn.Parameter(torch.ones(16, dtype=torch.bfloat16))
    apart, before = logits(adapted(model=model)), list(model.state_dict())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert apart.dtype == torch.bfloat16
    lora.merge(model)
    with pytest.raises(RuntimeError, match=r"lora\.unmerge\(model\) first"):
        model.train()(TOKENS)
    lora.fold(model.eval())
    assert relative(logits(model).float(), apart.float()) < 0.1
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "blocks.1.mlp.down.bias" in before


@pytest.mark.parametrize("targets", [None, BLOCKS, TARGETS], ids=["full", "blocks", "blocks and head"])
def test_flops_of_a_step_follow_from_the_layers(targets):
    """6 for a trained weight, 4 for a frozen one; half of the tokens pass the output projection."""
    shape, adapter = ModelConfig(**SHAPE), targets and LoRAConfig(rank=4, targets=targets)
    blocks, head = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 40), 96 * 16
    added = 2 * 4 * (4 * 16 + 2 * 16 + 2 * 8 + 3 * (16 + 40))
    expected = {None: 6 * blocks + 3 * head, BLOCKS: 4 * blocks + 6 * added + 2 * head}
    expected[TARGETS] = expected[BLOCKS] + head
    assert finetune.step_flops(shape, adapter, 1, 0.5, 0) == expected[targets]
    attention = 4 * 5 * 2 * 16  # 5 keys, 2 layers, width 16
    forward = 2 * blocks + head + attention
    assert finetune.step_flops(shape, adapter, 1, 0.5, 5, plain=True) == expected[targets] + 3 * attention + forward
    assert finetune.step_flops(shape, None, 1, 1, 0) == shape.flops_per_token(0)


def save(directory, model: Transformer, under=None, config: LoRAConfig = SMALL) -> None:
    """A checkpoint as training saves it; under: the checkpoint that the model's adapter was trained on."""
    file, kept = checkpoint.weights(model)
    about = {"config": {"model": stage.describe(model.config)}, "read": {}, "counts": {"step": 1}}
    if under:
        about["config"] |= {"lora": stage.describe(config), "base": f"../{under.name}", "template": "chatml"}
        about["read"] = stage.outputs(under)
    checkpoint.save(directory, {file: kept, "state.pt": {}}, about)


@pytest.fixture
def saved(tmp_path):
    """A base, an adapter on it, and the logits of both together."""
    save(tmp_path / "base", base())
    model = adapted()
    save(tmp_path / "adapter", model, tmp_path / "base")
    return tmp_path, logits(model)


@TIED
@pytest.mark.parametrize("targets", [TARGETS, BLOCKS, ("down", "k")], ids=",".join)
def test_a_saved_adapter_loads_merged_into_its_base(tmp_path, tied, targets):
    """Also one that was saved when the head had no adapter."""
    config = LoRAConfig(rank=3, alpha=5.0, targets=targets)
    save(tmp_path / "base", base(tied=tied))
    model = adapted(config=config, model=base(tied=tied))
    save(tmp_path / "adapter", model, tmp_path / "base", config)
    shutil.move(tmp_path / "base", tmp_path / "moved/base")  # both move together
    shutil.move(tmp_path / "adapter", tmp_path / "moved/adapter")
    loaded = checkpoint.load_model(tmp_path / "moved/adapter")
    assert not loaded.training
    assert not lora.layers(loaded)
    assert all(p.requires_grad for p in loaded.parameters())
    assert (loaded.head.weight is loaded.embed.weight) == tied
    assert list(loaded.state_dict()) == list(base(tied=tied).state_dict())
    assert relative(logits(loaded), logits(model)) < 2e-5
    assert checkpoint.template(tmp_path / "moved/adapter") == "chatml"


def test_an_adapter_on_an_adapter_loads(saved):
    place, _ = saved
    config = LoRAConfig(rank=2, alpha=8.0, dropout=0.0, targets=("q", "up", "head"))
    above = adapted(5, config, checkpoint.load_model(place / "adapter"))
    save(place / "above", above, place / "adapter", config)
    loaded = logits(checkpoint.load_model(place / "above"))
    weights = {k: v.double() for k, v in base().state_dict().items()}  # both by hand, in float64
    for model, scale in ((adapted(), 6 / 4), (above, 8 / 2)):
        for name, layer in lora.layers(model).items():
            weights[f"{name}.weight"] += scale * layer.b["default"].data.double() @ layer.a["default"].data.double()
    plain = base().double()
    plain.load_state_dict(weights)
    assert relative(loaded, logits(plain)) < 1e-5


def test_another_base_or_none_is_refused(saved):
    place, _ = saved
    save(place / "other", base(7))
    for model in (base(), checkpoint.load_model(place / "other")):
        with pytest.raises(UserError, match=r"adapter holds an adapter of another model; load the one in .*base"):
            checkpoint.load_adapter(place / "adapter", model)
    save(place / "base", base(7))
    with pytest.raises(UserError, match=rf"{place}/adapter holds .* in {place}/base, which .* or has changed"):
        checkpoint.load_model(place / "adapter")
    shutil.rmtree(place / "base")
    with pytest.raises(UserError, match=f"{place}/adapter holds .* in {place}/base, which is not there"):
        checkpoint.load_model(place / "adapter")


@pytest.mark.parametrize("described", [LoRAConfig(rank=5), LoRAConfig(rank=4, targets=BLOCKS)], ids=str)
def test_an_adapter_of_another_shape_than_its_manifest_says_is_refused(saved, described):
    save(saved[0] / "adapter", adapted(), saved[0] / "base", described)
    with pytest.raises(UserError, match=f"{saved[0]}/adapter does not hold the model its manifest describes"):
        checkpoint.load_model(saved[0] / "adapter")


def test_several_saved_adapters_over_one_base(saved):
    place, expected = saved
    save(place / "second", adapted(9), place / "base")
    model = checkpoint.load_model(place / "base")
    checkpoint.load_adapter(place / "adapter", model, "one")
    checkpoint.load_adapter(place / "second", model, "two")
    assert torch.equal(logits(model), logits(adapted(9)))
    lora.use(model, "one")
    assert torch.equal(logits(model), expected)
