"""LoRA: against peft, merged and not, what is trained and what is kept, and checkpoints of adapters."""

import copy
import math
import shutil

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import checkpoint
import finetune
import lora
import stage
from cli import UserError
from lora import TARGETS, LoRAConfig
from model import ModelConfig, Transformer
from optim import make_optimizers
from trainer import TrainConfig

# Every projection but q and o is rectangular.
SHAPE = {
    "vocab_size": 96,
    "context_length": 24,
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_ff": 40,
}
SMALL = LoRAConfig(rank=4, alpha=6.0, dropout=0.0)
TOKENS = torch.randint(96, (3, 24), generator=torch.Generator().manual_seed(0))
# Rows of several texts, and of each of these the beginning not trained.
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([24], [7, 1, 16], [11, 13])])
TARGET_IDS = TOKENS.roll(-1, 1).masked_fill(POSITIONS < 3, -100)


def base(seed: int = 0, tied: bool = False) -> Transformer:
    """Weights large enough that every part of the model shows in its logits."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**SHAPE, tie_embeddings=tied))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    return model.eval()


def adapted(seed: int = 1, config: LoRAConfig = SMALL, model: Transformer | None = None, name: str = "default"):
    """The base, or another model, with an adapter that is not zero."""
    model = base() if model is None else model
    lora.attach(model, config, name)
    fill(model, name, seed)
    return model


def fill(model: Transformer, name: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for layer in lora.layers(model).values():
        if name in layer.configs:
            layer.a[name].data.normal_(0, 0.5, generator=draw)
            layer.b[name].data.normal_(0, 0.5, generator=draw)


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def contents(model: Transformer) -> dict[str, bytes]:
    """The base's weights, byte for byte."""
    kept = {k: v for k, v in model.state_dict().items() if ".a." not in k and ".b." not in k}
    return {k: v.numpy().tobytes() for k, v in kept.items()}


def test_the_default_adapter_has_as_many_numbers_as_by_hand():
    shape = {"vocab_size": 32_768, "context_length": 1_024, "n_layers": 6, "d_model": 256, "n_heads": 4}
    with torch.device("meta"):
        model = Transformer(ModelConfig(**shape))
        alone = model.num_parameters()
        lora.attach(model, LoRAConfig())
    attention, mlp = 4 * 32 * (256 + 256), 3 * 32 * (256 + 1_024)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 6 * (attention + mlp) == 1_130_496
    assert model.num_parameters() == alone + trained == 24_202_496


# -------------------------------------------------------------------------------------------------------- against peft

SUBSETS = [TARGETS, ("q", "v"), ("k",), ("o", "down"), ("gate", "up", "down"), ("v", "k", "up")]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("targets", SUBSETS, ids=",".join)
def test_peft_computes_the_same(targets, dtype, tolerance):
    plain = base()
    theirs = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), lora_dropout=0.0, bias="none"), copy.deepcopy(plain)
    ).to(dtype)
    ours = adapted(config=LoRAConfig(rank=4, alpha=6.0, dropout=0.0, targets=targets), model=plain).to(dtype)
    others = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    pairs = {}
    for name, layer in lora.layers(ours).items():
        pairs[f"{name}.a"] = layer.a["default"], others.pop(f"{name}.lora_A.default.weight")
        pairs[f"{name}.b"] = layer.b["default"], others.pop(f"{name}.lora_B.default.weight")
    assert not others
    assert len(pairs) == 2 * 2 * len(targets)
    assert {p for p in ours.parameters() if p.requires_grad} == {p for p, _ in pairs.values()}
    for mine, other in pairs.values():
        other.data.copy_(mine.data)
    assert relative(logits(ours), logits(theirs)) < tolerance
    assert relative(logits(ours), logits(base().to(dtype))) > 0.1
    for options in ({}, {"positions": POSITIONS}):
        losses = [model(TOKENS, TARGET_IDS, **options) for model in (ours, theirs)]
        assert relative(*losses) < tolerance
        for model, loss in zip((ours, theirs), losses, strict=True):
            model.zero_grad()
            loss.backward()
        for name, (mine, other) in pairs.items():
            assert mine.grad.norm() > 0
            assert relative(mine.grad, other.grad) < tolerance, name


# ----------------------------------------------------------------------------------------------------- merged, or none


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merged_it_computes_the_same_and_unmerged_the_base_is_back_bit_for_bit(tied):
    model, before = base(tied=tied), contents(base(tied=tied))
    apart = logits(adapted(model=model))
    for times in (1, 2):
        for _ in range(times):
            lora.merge(model)
        assert relative(logits(model), apart) < 1e-5
        assert contents(model) == before  # what would be saved: the adapter is beside it
        for _ in range(times):
            lora.unmerge(model)
        assert contents(model) == before
        assert torch.equal(logits(model), apart)


def test_a_fresh_adapter_changes_nothing_bit_for_bit():
    model, before = base(), logits(base())
    lora.attach(model, LoRAConfig())
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.train()), before)
    for layer in lora.layers(model).values():
        bound = 1 / math.sqrt(layer.in_features)  # of nn.Linear's own weights
        assert 0.9 * bound < layer.a["default"].abs().max() <= bound
        assert not layer.b["default"].any()


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_without_the_adapter_the_model_is_the_base_bit_for_bit(merged):
    model, before = adapted(), logits(base())
    own = logits(model)
    if merged:
        lora.merge(model)
    with lora.without(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), own)
    with pytest.raises(ZeroDivisionError), lora.without(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), own)
    if merged:
        lora.merge(model)
    lora.use(model, None)
    assert torch.equal(logits(model), before)
    lora.merge(model)
    assert torch.equal(logits(model), before)
    lora.use(model, "default")
    assert torch.equal(logits(model), own)


def test_of_several_adapters_each_gives_what_it_gives_alone():
    configs = {
        "all": SMALL,
        "few": LoRAConfig(rank=2, alpha=1.0, dropout=0.0, targets=("q", "down")),
        "other": LoRAConfig(rank=8, alpha=16.0, dropout=0.0, targets=("down", "up", "k")),
    }
    alone = {None: logits(base())}
    model = base()
    for seed, (name, config) in enumerate(configs.items()):
        alone[name] = logits(adapted(seed, config))
        adapted(seed, config, model, name)
        assert torch.equal(logits(model), alone[name])
    for name in ("few", "all", "other", None, "all", "other", "few", None):
        lora.use(model, name)
        assert torch.equal(logits(model), alone[name])
        lora.merge(model)
        assert relative(logits(model), alone[name]) < 1e-5
    with pytest.raises(KeyError, match="no adapter 'gone'"):
        lora.use(model, "gone")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_folded_it_is_a_plain_model(tied):
    model = adapted(config=LoRAConfig(rank=4, alpha=6.0, targets=("q", "v", "down")), model=base(tied=tied))
    apart = logits(model)
    lora.fold(model)
    fresh = Transformer(model.config)
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert (model.head.weight is model.embed.weight) == tied
    assert relative(logits(model), apart) < 1e-5
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    model(TOKENS, TARGET_IDS).backward()
    assert all(p.grad is not None for p in model.parameters())


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_trains_the_adapter_and_leaves_the_base_bit_for_bit(precision, optimizer):
    model = adapted(config=LoRAConfig(rank=4, alpha=6.0, dropout=0.05)).train()
    before, was = contents(model), {name: p.clone() for name, p in model.named_parameters()}
    config = TrainConfig(steps=1, batch_size=1, learning_rate=1e-2, weight_decay=0.1, optimizer=optimizer)
    optimizers = make_optimizers(model, config)
    held = {p for each in optimizers for group in each.param_groups for p in group["params"]}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        model(TOKENS, TARGET_IDS, positions=POSITIONS).backward()
    for each in optimizers:
        each.step()
    adapter = {p for layer in lora.layers(model).values() for p in (*layer.a.values(), *layer.b.values())}
    assert len(adapter) == 2 * 2 * 7
    assert held == adapter
    assert contents(model) == before
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None) == (p in adapter) == (not torch.equal(p, was[name])), name
        assert p.dtype == torch.float32
        assert p.grad is None or p.grad.dtype == torch.float32


def test_a_second_adapter_freezes_the_first():
    model = adapted(name="first")
    adapted(2, model=model, name="second")
    model(TOKENS, TARGET_IDS).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 2 * 7
    assert all(name.endswith((".a.second", ".b.second")) for name in trained)


def test_recomputed_activations_drop_the_same_inputs():
    model, gradients = adapted(config=LoRAConfig(rank=4, dropout=0.5)).train(), []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        torch.manual_seed(3)
        model.zero_grad()
        model(TOKENS, TARGET_IDS).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


# ------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_sets_a_share_of_p_to_0_and_keeps_the_rest(dtype, p):
    torch.manual_seed(0)
    x = torch.rand(3, 111, 333).to(dtype) + 0.5  # an odd number of elements, none 0
    y = lora.dropped(x, p)
    assert y.shape == x.shape
    assert y.dtype == dtype
    zero, n = y == 0, x.numel()
    assert n % 2
    assert abs(int(zero.sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert torch.equal(y[~zero], x[~zero])
    deviation = math.sqrt(p * (1 - p) * float(x.double().square().sum()))  # of the sum
    assert abs(float(y.double().sum() - (1 - p) * x.double().sum())) < 5 * deviation


def test_what_dropout_drops_is_independent_from_element_to_element():
    torch.manual_seed(0)
    zero = (lora.dropped(torch.ones(400_001), 0.3) == 0).double()
    for apart in (1, 2, 3, 4, 5, 8, 1000):
        both = float((zero[apart:] * zero[:-apart]).mean())
        assert both == pytest.approx(0.09, abs=5 * math.sqrt(0.09 * 0.91 / 200_000))


def test_the_share_that_dropout_drops_is_rounded_to_a_65536th():
    torch.manual_seed(0)
    x = torch.ones(1 << 22)
    assert int((lora.dropped(x, 0.4 / 65_536) == 0).sum()) == 0
    assert int((lora.dropped(x, 0.6 / 65_536) == 0).sum()) == pytest.approx(64, abs=5 * 8)
    for kept in (1.4, 0.6, 0.4, 1e-9):  # never all
        assert int((lora.dropped(x, 1 - kept / 65_536) != 0).sum()) == pytest.approx(64, abs=5 * 8)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5, 1), (2, 7, 3)], ids=str)
def test_dropout_takes_any_shape(shape):
    y = lora.dropped(torch.ones(shape), 0.5)
    assert y.shape == shape
    assert set(y.flatten().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_gradient_of_dropout_is_its_mask(dtype):
    torch.manual_seed(0)
    x = torch.ones(7, 33, dtype=dtype, requires_grad=True)
    y = lora.dropped(x, 0.25)
    y.backward(torch.full_like(y, 3.0))
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, 3 * (y != 0).to(dtype))


def test_equal_seeds_drop_the_same():
    x, found = torch.ones(1_001), []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append(lora.dropped(x, 0.5))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_only_the_adapters_input_is_dropped_and_only_in_training():
    model = adapted(config=LoRAConfig(rank=4, alpha=6.0, dropout=0.5))
    without = logits(adapted())
    assert torch.equal(logits(model), without)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(logits(model), without)
    with lora.without(model):
        assert torch.equal(logits(model), logits(base()))
    x, layer = torch.randn(5, 16), model.blocks[0].attn.k
    torch.manual_seed(0)
    dropped = lora.dropped(x, 0.5)
    torch.manual_seed(0)
    by_hand = x @ layer.weight.T + 6 / 4 / 0.5 * dropped @ layer.a["default"].T @ layer.b["default"].T
    torch.testing.assert_close(layer(x), by_hand)


# ---------------------------------------------------------------------------------------------------------- the config

WRONG = [
    ({"rank": 0}, ValueError, "rank"),
    ({"rank": -1}, ValueError, "rank"),
    ({"rank": 2.0}, TypeError, "rank"),
    ({"rank": True}, TypeError, "rank"),
    ({"rank": None}, TypeError, "rank"),
    ({"alpha": 0.0}, ValueError, "alpha"),
    ({"alpha": -1.0}, ValueError, "alpha"),
    ({"alpha": math.inf}, ValueError, "alpha"),
    ({"alpha": math.nan}, ValueError, "alpha"),
    ({"alpha": "64"}, TypeError, "alpha"),
    ({"dropout": -0.1}, ValueError, "dropout"),
    ({"dropout": 1.0}, ValueError, "dropout"),
    ({"dropout": math.nan}, ValueError, "dropout"),
    ({"dropout": None}, TypeError, "dropout"),
    ({"targets": ()}, ValueError, "targets"),
    ({"targets": ("q", "q")}, ValueError, "targets"),
    ({"targets": ["q"]}, TypeError, "targets"),
    ({"targets": "q"}, TypeError, "targets"),
    ({"targets": (1,)}, TypeError, "targets"),
]


@pytest.mark.parametrize(("wrong", "error", "name"), WRONG, ids=[str(wrong) for wrong, _, _ in WRONG])
def test_a_wrong_field_is_named(wrong, error, name):
    with pytest.raises(error, match=rf"^{name} (is|are) "):
        LoRAConfig(**wrong)


def test_an_unknown_field_is_refused_and_whole_numbers_pass_for_a_float():
    with pytest.raises(TypeError, match="ranks"):
        LoRAConfig(ranks=3)
    assert LoRAConfig(alpha=16, dropout=0).alpha == 16


# --------------------------------------------------------------------------------------------------------- checkpoints


def save(directory, model: Transformer, under=None, config: LoRAConfig = SMALL) -> None:
    """A checkpoint as training saves it; under: the one that the model's adapter was trained on."""
    file, kept = checkpoint.weights(model)
    about = {"config": {"model": stage.describe(model.config)}, "read": {}, "counts": {"step": 1}}
    if under:
        of = {"lora": stage.describe(config), "base": f"../{under.name}", "template": "chatml"}
        about |= {"config": about["config"] | of, "read": stage.outputs(under)}
    checkpoint.save(directory, {file: kept, "state.pt": {}}, about)


@pytest.fixture
def saved(tmp_path):
    """A base, an adapter on it, and the logits of both together."""
    save(tmp_path / "base", base())
    model = adapted()
    save(tmp_path / "adapter", model, tmp_path / "base")
    return tmp_path, logits(model)


def test_of_a_frozen_model_the_adapter_alone_is_kept():
    model = base()
    file, kept = checkpoint.weights(model)
    assert (file, list(kept)) == ("weights.pt", list(model.state_dict()))
    file, kept = checkpoint.weights(adapted(model=model))
    named = [f"{name}.{part}.default" for name in lora.layers(model) for part in "ab"]
    assert (file, sorted(kept)) == ("adapter.pt", sorted(named))
    lora.merge(model)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in checkpoint.weights(model)[1].items())
    lora.fold(model)
    file, kept = checkpoint.weights(model)
    assert (file, list(kept)) == ("weights.pt", list(base().state_dict()))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_saved_adapter_loads_merged_into_its_base(tmp_path, tied):
    config = LoRAConfig(rank=3, alpha=5.0, targets=("down", "k"))
    save(tmp_path / "base", base(tied=tied))
    model = adapted(config=config, model=base(tied=tied))
    save(tmp_path / "adapter", model, tmp_path / "base", config)
    assert not (tmp_path / "adapter/weights.pt").exists()
    assert checkpoint.adapts(tmp_path / "adapter")
    assert not checkpoint.adapts(tmp_path / "base")
    assert checkpoint.base(tmp_path / "adapter") == tmp_path / "base"
    assert checkpoint.template(tmp_path / "adapter") == "chatml"
    assert checkpoint.template(tmp_path / "base") is None
    loaded = checkpoint.load_model(tmp_path / "adapter")
    assert not loaded.training
    assert not lora.layers(loaded)
    assert list(loaded.state_dict()) == list(base(tied=tied).state_dict())
    assert relative(logits(loaded), logits(model)) < 1e-5
    assert torch.equal(logits(checkpoint.load_model(tmp_path / "base")), logits(base(tied=tied)))


def test_a_run_moved_as_a_whole_loads(saved, tmp_path_factory):
    place, expected = saved
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "run"
    shutil.move(place, elsewhere)
    assert relative(logits(checkpoint.load_model(elsewhere / "adapter")), expected) < 1e-5


def test_an_adapter_on_an_adapter_loads(saved):
    place, _ = saved
    config = LoRAConfig(rank=2, alpha=8.0, dropout=0.0, targets=("q", "up"))
    above = adapted(5, config, checkpoint.load_model(place / "adapter"))
    save(place / "above", above, place / "adapter", config)
    loaded = logits(checkpoint.load_model(place / "above"))
    assert relative(loaded, logits(above)) < 1e-5
    under = adapted()  # both by hand, in float64
    weights = {k: v.double() for k, v in base().state_dict().items()}
    for model, scale in ((under, 6 / 4), (above, 8 / 2)):
        for name, layer in lora.layers(model).items():
            weights[f"{name}.weight"] += scale * layer.b["default"].data.double() @ layer.a["default"].data.double()
    plain = base().double()
    plain.load_state_dict(weights)
    assert relative(loaded, logits(plain)) < 1e-5
    save(place / "base", base(7))
    with pytest.raises(UserError, match=f"{place}/adapter holds an adapter of another model"):
        checkpoint.load_model(place / "above")


def test_another_model_in_the_place_of_the_base_is_refused(saved):
    save(saved[0] / "base", base(7))
    with pytest.raises(UserError, match=rf"{saved[0]}/adapter holds .* another model than .* {saved[0]}/base"):
        checkpoint.load_model(saved[0] / "adapter")


def test_a_base_that_is_gone_is_named(saved):
    shutil.rmtree(saved[0] / "base")
    with pytest.raises(UserError, match=f"{saved[0]}/adapter holds .* in {saved[0]}/base, which is not there"):
        checkpoint.load_model(saved[0] / "adapter")


@pytest.mark.parametrize("file", ["base/weights.pt", "adapter/adapter.pt"])
@pytest.mark.parametrize("harm", ["changed", "cut short", "gone"])
def test_a_damaged_file_is_named(saved, file, harm):
    path = saved[0] / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content if harm == "changed" else content[:-7])
    with pytest.raises(UserError, match=f"^{path} .*damaged"):
        checkpoint.load_model(saved[0] / "adapter")


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=5, alpha=6.0),
        LoRAConfig(rank=4, alpha=6.0, targets=("q", "v")),
    ],
    ids=["rank", "fewer targets"],
)
def test_an_adapter_of_another_shape_than_its_manifest_says_is_refused(saved, config):
    save(saved[0] / "adapter", adapted(), saved[0] / "base", config)
    with pytest.raises(UserError, match=f"{saved[0]}/adapter does not hold the model its manifest describes"):
        checkpoint.load_model(saved[0] / "adapter")
    save(saved[0] / "adapter", adapted(config=LoRAConfig(rank=4, targets=("q",))), saved[0] / "base", SMALL)
    with pytest.raises(UserError, match=f"{saved[0]}/adapter does not hold .* it has no "):
        checkpoint.load_model(saved[0] / "adapter")


def test_an_adapter_of_another_models_shape_is_refused(saved):
    place, _ = saved
    wide = Transformer(ModelConfig(**SHAPE | {"d_ff": 48}))
    save(place / "adapter", adapted(model=wide), place / "base")
    with pytest.raises(UserError, match=f"{place}/adapter does not hold the model its manifest describes"):
        checkpoint.load_model(place / "adapter")


def test_several_saved_adapters_over_one_base(saved):
    place, expected = saved
    save(place / "second", adapted(9), place / "base")
    model = checkpoint.load_model(place / "base")
    plain, before = logits(model), contents(model)
    checkpoint.load_adapter(place / "adapter", model, "one")
    checkpoint.load_adapter(place / "second", model, "two")
    assert torch.equal(logits(model), logits(adapted(9)))
    lora.use(model, "one")
    assert torch.equal(logits(model), expected)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"one"}
    lora.merge(model)
    assert relative(logits(model), expected) < 1e-5
    lora.use(model, None)
    assert torch.equal(logits(model), plain)
    assert contents(model) == before
    with pytest.raises(ValueError, match="name is 'one'; expected one without a dot that no other adapter has"):
        checkpoint.load_adapter(place / "second", model, "one")


def test_a_saved_adapter_is_refused_by_another_model(saved):
    save(saved[0] / "other", base(7))
    for model in (base(), checkpoint.load_model(saved[0] / "other")):
        with pytest.raises(UserError, match=r"adapter holds an adapter of another model; load the one in .*base"):
            checkpoint.load_adapter(saved[0] / "adapter", model)
        assert not lora.layers(model)


# ------------------------------------------------------------------------------------------------- other architectures


class GELUMLP(nn.Module):
    """A feed-forward network as GPT-2 has it: no gate, and with biases."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def gelu_base() -> Transformer:
    model = base()
    for block in model.blocks:
        block.mlp = GELUMLP()
    return model.eval()


def test_targets_that_the_model_lacks_are_named_with_those_that_it_has():
    model = gelu_base()
    with pytest.raises(UserError, match="'gate'; the model's blocks have q, k, v, o, up, down: set lora=LoRAConfig"):
        lora.attach(model, LoRAConfig())
    with pytest.raises(UserError, match="targets names 'head', 'x'; the model's blocks have q, k, v, o, gate, up,"):
        lora.attach(base(), LoRAConfig(targets=("q", "head", "x")))
    assert not lora.layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_another_feed_forward_network_is_adapted_biases_and_all():
    model = gelu_base()
    before = logits(model)
    lora.attach(model, LoRAConfig(rank=4, alpha=6.0, dropout=0.0, targets=("q", "k", "v", "o", "up", "down")))
    assert torch.equal(logits(model), before)
    fill(model, "default", 1)
    apart = logits(model)
    assert relative(apart, before) > 0.1
    model(TOKENS, TARGET_IDS).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 2 * 6
    assert all(name.endswith(("a.default", "b.default")) for name in trained)
    lora.merge(model)
    assert relative(logits(model), apart) < 1e-5
    lora.fold(model)
    assert relative(logits(model), apart) < 1e-5
    assert list(model.state_dict()) == list(gelu_base().state_dict())


@pytest.mark.parametrize("adapter", [None, SMALL], ids=["full", "adapter"])
def test_flops_of_a_step_follow_from_the_layers(adapter, monkeypatch):
    """6 for a trained weight, 4 for a frozen one; half of the tokens pass the output projection."""
    shape = ModelConfig(**SHAPE)
    block, head = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 40, 96 * 16
    extra = 4 * (4 * 16 + 2 * 16 + 2 * 8 + 3 * (16 + 40)) if adapter else 0
    assert finetune.sizes(shape, adapter) == (2 * block, head, 2 * extra)
    found = finetune.sizes(shape, adapter).trained(1, 0.5)
    assert found == (4 if adapter else 6) * (2 * block + head / 2) + 6 * 2 * extra
    if adapter is None:
        assert finetune.sizes(shape, None).trained(1, 1) == shape.flops_per_token(0)
    monkeypatch.setattr(finetune, "Transformer", lambda shape: gelu_base())
    assert finetune.sizes(shape, None).blocks == 2 * (block - 16 * 40)


# ------------------------------------------------------------------------------------------- what is easily done wrong


def test_a_merged_model_is_not_trained():
    model = adapted().train()
    lora.merge(model)
    with pytest.raises(RuntimeError, match=r"lora\.unmerge\(model\) first"):
        model(TOKENS)


def test_merged_it_can_change_its_dtype_and_back():
    model = adapted()
    lora.merge(model)
    model.double()
    lora.unmerge(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert relative(logits(model), logits(adapted().double())) < 1e-14


def test_an_adapter_of_float32_on_a_base_of_bfloat16():
    model = adapted(model=base().bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found = logits(model)
    assert found.dtype == torch.bfloat16
    assert relative(found.float(), logits(adapted())) < 0.05
    lora.merge(model)
    assert logits(model).dtype == torch.bfloat16
    lora.fold(model)
    assert model.blocks[0].attn.q.weight.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # PyTorch's own use
def test_compiled_only_attention_of_packed_rows_breaks_the_graph():
    """Dropout does not, and two layers that read the same input do not drop the same of it."""
    part = adapted(config=LoRAConfig(rank=4, alpha=6.0, dropout=0.5)).train().blocks[0].mlp
    x = torch.randn(2, 24, 16, requires_grad=True)
    assert torch._dynamo.explain(part)(x).graph_break_count == 0
    one, two, ones = torch.ones(1), torch.ones(1), torch.ones(64, 64, requires_grad=True)
    both = torch.compile(
        lambda x, one, two: (lora.dropped(x, 0.5, one), lora.dropped(x, 0.5, two)),
        fullgraph=True,
        backend="aot_eager_decomp_partition",  # which has one call serve for equal ones, as inductor does
    )
    torch.manual_seed(0)
    first, second = both(ones, one, two)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(lora.dropped(ones, 0.5, one), first)
