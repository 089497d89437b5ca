import pytest
import torch
from original_layouts import LightningDiT, randomize

from favae import LightningDiTTransformer2DModel
from favae.adapters import lightningdit_from_transformer, transformer_from_lightningdit
from favae.errors import CheckpointError

LATENTS = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
TIMES, LABELS = torch.tensor([0.0, 0.37, 1.0]), torch.tensor([0, 4, 5])  # 5 is the null class


@pytest.mark.parametrize(
    "layout", [{}, {"qk_norm": True}, {"shift": False}, {"patch": 1, "depth": 1, "heads": 3, "head_dim": 12}]
)
@torch.no_grad()
def test_the_transformer_gives_the_same_velocities(layout):
    original = randomize(LightningDiT(**layout))
    config, state = transformer_from_lightningdit(original.state_dict())
    assert (config["mlp_ratio"], config["num_classes"]) == (4.0, 5)
    model = LightningDiTTransformer2DModel(**config).eval()
    model.load_state_dict(state)
    expected = original(LATENTS, TIMES, LABELS)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(LATENTS, TIMES, LABELS).sample, expected, atol=1e-5, rtol=1e-5)

    back = lightningdit_from_transformer(model.config, model.state_dict())
    randomize(original).load_state_dict(back)  # strict
    for name, tensor in original.state_dict().items():
        fixed = name == "pos_embed" or name.startswith("feat_rope")
        assert torch.allclose(back[name], tensor, atol=1e-6) if fixed else torch.equal(back[name], tensor), name
    _, again = transformer_from_lightningdit(back)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_half_precision_stays():
    state = {name: tensor.bfloat16() for name, tensor in LightningDiT().state_dict().items()}
    config, converted = transformer_from_lightningdit(state)
    assert {tensor.dtype for tensor in converted.values()} == {torch.bfloat16}
    back = lightningdit_from_transformer(config, converted)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items() if "rope" not in name)


def test_transformers_that_the_original_has_no_place_for():
    config, state = transformer_from_lightningdit(LightningDiT().state_dict())
    for changes, kind in (({"text_dim": 8}, "of texts"), ({"num_classes": 0}, "without classes")):
        with pytest.raises(CheckpointError, match=kind):
            lightningdit_from_transformer(config | changes, state)


def test_what_is_not_of_the_layout_is_named():
    state = LightningDiT().state_dict()

    def refused(match: str, *without: str, **changes) -> None:
        with pytest.raises(CheckpointError, match=match):
            kept = {name: state[name] for name in state if name not in without}
            transformer_from_lightningdit(kept | {name.replace("/", "."): t for name, t in changes.items()})

    refused(r"^lacks blocks\.1\.norm2\.weight$", "blocks.1.norm2.weight")
    refused(r"^lacks feat_rope\.freqs_cos$", "feat_rope.freqs_cos")  # use_rope off
    refused(r"^has blocks\.0\.mlp\.fc1\.weight, which", **{"blocks/0/mlp/fc1/weight": torch.zeros(1)})
    refused(  # wo_shift in one block only
        r"^blocks\.1\.adaLN_modulation\.1\.weight has shape \(64, 16\), expected \(96, 16\)",
        **{"blocks/1/adaLN_modulation/1/weight": torch.zeros(64, 16)},
    )
    refused(  # learn_sigma
        r"^final_layer\.linear\.bias has shape \(24,\), expected \(12,\)",
        **{"final_layer/linear/bias": torch.zeros(24)},
    )
    refused(r"^pos_embed is not the fixed embedding of 3x3 tokens", pos_embed=state["pos_embed"].flip(1))
    refused(r"^feat_rope\.freqs_sin is not", **{"feat_rope/freqs_sin": -state["feat_rope.freqs_sin"]})
    refused(
        r"^y_embedder\.embedding_table\.weight has shape \(6,\), ",
        **{"y_embedder/embedding_table/weight": torch.zeros(6)},
    )
