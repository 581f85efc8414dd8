"""The InstantX adapter and gated terms: read by every block, confined by a mask, beside XLabs, strict, and gone without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters

from deployments.contracts import IdentityRequest, IdentityTokens
from deployments.conversion.instantx import InstantXSizes
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.errors import CheckpointMismatch, InvalidRequest
from deployments.identity.image_attention import IMAGE_KEY, GatedTerm, ImageAttention, ImageTerm
from deployments.identity.instantx_ip_adapter import InstantX, InstantXAdapter, InstantXConfig, config_of, load_projection, load_readers
from deployments.identity.xlabs_ip_adapter import XLabsAdapter
from tests.mini_drawing import ATTACH, FLUX, XLABS, XLABS_FILE, request, spec, texts, xlabs_person
from tests.named_weights import fill, named_tensor
from training.mini.generator.sizes import INSTANTX

DOUBLES, SINGLES, HEADS, HEAD_DIM, PICTURE, TEXT = 3, 2, 2, 16, 6, 4
CONFIG = InstantXConfig(image_dim=8, tokens=4, token_dim=20, dim=HEADS * HEAD_DIM, blocks=DOUBLES + SINGLES)
METHOD = "instantx-ip-adapter"


def _transformer() -> Any:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=DOUBLES, num_single_layers=SINGLES, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
        joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    fill(model)
    return model.eval()


@torch.inference_mode()
def _run(transformer: Any, *condition: object) -> Tensor:
    (velocity,) = transformer(
        hidden_states=named_tensor("picture", 1, PICTURE, 8), encoder_hidden_states=named_tensor("text", 1, TEXT, 20),
        pooled_projections=named_tensor("pooled", 1, 12), timestep=torch.tensor([0.5]), img_ids=torch.zeros(PICTURE, 3),
        txt_ids=torch.zeros(TEXT, 3), joint_attention_kwargs={IMAGE_KEY: condition}, return_dict=False,
    )  # fmt: skip
    assert isinstance(velocity, Tensor)
    return velocity


def _saved(folder: Path, config: InstantXConfig) -> Path:
    whole = InstantX(config)
    fill(whole)
    save_file(whole.state_dict(), folder / "ip-adapter.safetensors")
    return folder / "ip-adapter.safetensors"


def _term(name: str, mask: Tensor | None = None) -> GatedTerm:
    keys, values = (named_tensor(f"{name}'s {kind}", DOUBLES + SINGLES, 1, 4, HEADS, HEAD_DIM) for kind in ("keys", "values"))
    return GatedTerm(keys, values, torch.full((DOUBLES + SINGLES,), 0.7), mask)


def _added(name: str) -> ImageTerm:
    keys, values = (named_tensor(f"{name}'s {kind} at XLabs", DOUBLES, 1, 4, HEADS, HEAD_DIM) for kind in ("keys", "values"))
    return ImageTerm(keys, values, torch.ones(DOUBLES))


def _error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _found(query: Tensor, term: GatedTerm, block: int) -> Tensor:
    """What queries [tokens, heads, head_dim] find, by softmax -> [tokens, width]."""
    keys, values = (x[block, 0].transpose(0, 1) for x in (term.keys, term.values))
    share = torch.softmax(query.transpose(0, 1) @ keys.transpose(1, 2) / HEAD_DIM**0.5, dim=-1)
    return 0.7 * (share @ values).transpose(0, 1).flatten(1)


# --- gated terms --------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_double_block_projects_what_its_picture_finds_and_leaves_its_text_alone() -> None:
    transformer, term, block = _transformer(), _term("Ada"), 1
    attn = transformer.transformer_blocks[block].attn
    picture, text = named_tensor("tokens", 1, PICTURE, 32), named_tensor("words", 1, TEXT, 32)
    stock_picture, stock_text = attn(picture, text)
    ImageAttention(transformer)
    of_picture, of_text = attn(picture, text, **{IMAGE_KEY: (term,)})
    query = attn.norm_q(attn.to_q(picture).unflatten(-1, (HEADS, HEAD_DIM)))[0]
    expected = torch.nn.functional.linear(_found(query, term, block), attn.to_out[0].weight)
    assert _error((of_picture - stock_picture)[0], expected) < 1e-5
    assert torch.equal(of_text, stock_text)


@torch.inference_mode()
def test_in_a_single_block_text_and_picture_read_it() -> None:
    transformer, term, block = _transformer(), _term("Ada"), 1
    attn = transformer.single_transformer_blocks[block].attn
    tokens = named_tensor("tokens", 1, TEXT + PICTURE, 32)
    stock = attn(tokens)
    ImageAttention(transformer)
    query = attn.norm_q(attn.to_q(tokens).unflatten(-1, (HEADS, HEAD_DIM)))[0]
    expected = _found(query, term, DOUBLES + block)
    assert _error((attn(tokens, **{IMAGE_KEY: (term,)}) - stock)[0], expected) < 1e-5
    left = (torch.arange(PICTURE) < PICTURE // 2).float().view(1, PICTURE, 1)
    masked = (attn(tokens, **{IMAGE_KEY: (_term("Ada", left),)}) - stock)[0]
    half = slice(TEXT, TEXT + PICTURE // 2)
    assert _error(masked[half], expected[half]) < 1e-5
    assert not masked[:TEXT].any() and not masked[half.stop :].any()


def test_references_add_up_in_one_block_and_a_mask_of_ones_is_not_none() -> None:
    """None lets the text read too; a mask is of the picture, however much of it."""
    transformer = _transformer()
    ImageAttention(transformer)
    attn, tokens = transformer.single_transformer_blocks[0].attn, named_tensor("tokens", 1, TEXT + PICTURE, 32)
    with torch.inference_mode():
        base, ada, bruno, both = (
            attn(tokens, **{IMAGE_KEY: terms}) for terms in ((), (_term("Ada"),), (_term("Bruno"),), (_term("Ada"), _term("Bruno")))
        )
    torch.testing.assert_close(both - base, (ada - base) + (bruno - base))
    everywhere = _run(transformer, _term("Ada", torch.ones(1, PICTURE, 1)))
    assert _error(everywhere, _run(transformer, _term("Ada"))) > 1e-3


def test_xlabs_and_instantx_act_together_each_as_alone_on_one_block() -> None:
    transformer = _transformer()
    ImageAttention(transformer)
    attn = transformer.transformer_blocks[0].attn
    picture, text = named_tensor("tokens", 1, PICTURE, 32), named_tensor("words", 1, TEXT, 32)
    with torch.inference_mode():
        gated, _ = attn(picture, text, **{IMAGE_KEY: (_term("Ada"),)})
        _, _, added = attn(picture, text, **{IMAGE_KEY: (_added("Bruno"),)})
        one, _, other = attn(picture, text, **{IMAGE_KEY: (_added("Bruno"), _term("Ada"))})
    assert torch.equal(one, gated) and torch.equal(other, added)


def test_nothing_of_a_call_stays_for_the_next() -> None:
    transformer = _transformer()
    base = _run(transformer)
    ImageAttention(transformer)
    ada = _run(transformer, _term("Ada"))
    assert _error(ada, base) > 0.05
    for condition, expected in (((), base), ((_term("Ada"),), ada), ((_added("Bruno"), _term("Ada")), None), ((), base)):
        velocity = _run(transformer, *condition)
        assert expected is None or torch.equal(velocity, expected)


def test_without_gated_terms_single_blocks_are_stock_bit_for_bit() -> None:
    """XLabs' terms cost a single block nothing, also where InstantX is attached."""
    transformer = _transformer()
    tokens, attn = named_tensor("tokens", 1, TEXT + PICTURE, 32), transformer.single_transformer_blocks[0].attn
    with torch.inference_mode():
        base = attn(tokens)
        ImageAttention(transformer)
        assert torch.equal(attn(tokens, **{IMAGE_KEY: (_added("Bruno"),)}), base)


def test_fused_projections_read_the_same() -> None:
    transformer = _transformer()
    ImageAttention(transformer)
    apart = _run(transformer, _term("Ada"))
    transformer.fuse_qkv_projections()
    assert _error(_run(transformer, _term("Ada")), apart) < 1e-5


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Counts from zero, and leaves no compiled code behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_blocks_are_compiled_once_for_all_people_and_all_places(dynamo: None) -> None:
    transformer = _transformer()
    ImageAttention(transformer)
    ada, bruno = _run(transformer, _term("Ada")), _run(transformer, _term("Bruno"))
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.compile(backend="eager", fullgraph=True)
    assert torch.equal(_run(transformer, _term("Ada")), ada)
    graphs = counters["stats"]["unique_graphs"]
    assert torch.equal(_run(transformer, _term("Bruno")), bruno)
    assert counters["stats"]["unique_graphs"] == graphs <= 3


# --- the file -----------------------------------------------------------------------------------------------------------------------


def test_the_published_sizes_are_those_of_the_conversion() -> None:
    with torch.device("meta"):
        whole = InstantX(InstantXConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    assert shapes == InstantXSizes().shapes() and config_of(shapes, "it") == InstantXConfig()
    assert sum(tensor.numel() for tensor in whole.state_dict().values()) / 1e6 == pytest.approx(2645.6, abs=0.05)


def test_each_half_is_read_alone_and_is_the_files(tmp_path: Path) -> None:
    file = _saved(tmp_path, CONFIG)
    state = load_file(file)
    projection, readers = load_projection(file), load_readers(file)
    assert torch.equal(projection.state_dict()["proj.2.weight"], state["image_proj.proj.2.weight"])
    assert torch.equal(readers.state_dict()["4.to_v_ip.weight"], state["ip_adapter.4.to_v_ip.weight"])
    assert {p.requires_grad for p in (*projection.parameters(), *readers.parameters())} == {False}
    assert len(projection.state_dict()) + len(readers.state_dict()) == len(state)


@pytest.mark.parametrize(
    ("missing", "added", "said"),
    [
        ("image_proj.norm.weight", {}, "no InstantX IP-Adapter: it has no image_proj.norm.weight"),
        ("image_proj.proj.0.bias", {}, "1 missing: image_proj.proj.0.bias"),
        ("ip_adapter.3.to_v_ip.weight", {}, r"1 missing: ip_adapter\.3\.to_v_ip\.weight"),
        (None, {"ip_adapter.1.to_k_ip.bias": torch.zeros(32)}, r"1 left over: ip_adapter\.1\.to_k_ip\.bias"),
        (None, {"ip_adapter.1.to_k_ip.weight": torch.zeros(32, 19)}, r"1 wrong shape: ip_adapter\.1\.to_k_ip\.weight"),
        (None, {"image_proj.proj.2.weight": torch.zeros(81, 16)}, "does not divide into tokens 20 wide"),
        (None, {"ip_adapter.first.gate": torch.zeros(1)}, "makes no sense"),
    ],
)
def test_a_file_that_is_not_wholly_the_adapter_is_refused_by_both_halves(
    tmp_path: Path, missing: str | None, added: dict[str, Tensor], said: str
) -> None:
    file = _saved(tmp_path, CONFIG)
    state = {name: tensor for name, tensor in load_file(file).items() if name != missing} | added
    save_file(state, file)
    for half in (load_projection, load_readers):
        with pytest.raises(CheckpointMismatch, match=said):
            half(file)


def test_an_adapter_for_another_transformer_is_refused_and_nothing_attached(tmp_path: Path) -> None:
    transformer = _transformer()
    with pytest.raises(CheckpointMismatch, match=r"\(8, 256\), the transformer has \(5, 32\)"):
        InstantXAdapter(transformer, _saved(tmp_path, INSTANTX))
    assert {type(processor) for processor in transformer.attn_processors.values()} == {FluxAttnProcessor}


# --- the adapter --------------------------------------------------------------------------------------------------------------------


def test_keys_are_normed_values_are_not_and_the_weight_is_every_blocks(tmp_path: Path) -> None:
    adapter = InstantXAdapter(_transformer(), _saved(tmp_path, CONFIG))
    tokens = named_tensor("Ada", 1, 4, 20)
    (term,) = adapter.condition(tokens, IdentityRequest(method=METHOD, weight=0.5))
    assert isinstance(term, GatedTerm) and term.scales.tolist() == [0.5] * (DOUBLES + SINGLES)
    torch.testing.assert_close(term.keys.square().mean(-1), torch.ones(5, 1, 4, HEADS), rtol=1e-3, atol=1e-3)
    values = tokens @ load_file(tmp_path / "ip-adapter.safetensors")["ip_adapter.2.to_v_ip.weight"].T
    torch.testing.assert_close(term.values[2].flatten(2), values)


def test_what_the_adapter_does_not_know_is_refused(tmp_path: Path) -> None:
    adapter = InstantXAdapter(_transformer(), _saved(tmp_path, CONFIG))
    with pytest.raises(InvalidRequest, match="no option weight_type"):
        adapter.condition(named_tensor("Ada", 1, 4, 20), IdentityRequest(method=METHOD, options={"weight_type": "linear"}))
    with pytest.raises(ValueError, match=r"\[n, tokens, 20\]"):
        adapter.condition(named_tensor("Ada", 1, 4, 24), IdentityRequest(method=METHOD))
    assert adapter.condition(torch.zeros(1, 0, 20), IdentityRequest(method=METHOD)) == ()


def test_two_adapters_share_a_transformer_and_leave_in_turn() -> None:
    transformer: Any = FluxTransformer2DModel.from_pretrained(FLUX, subfolder="transformer", dtype=torch.float32).eval()
    xlabs = XLabsAdapter(transformer, XLABS_FILE)
    names = list(transformer.state_dict())
    attention = ImageAttention(transformer)
    attention.eject()
    assert {type(processor).__name__ for processor in transformer.attn_processors.values()} == {"ImageAttnProcessor"}
    xlabs.eject()
    assert {type(processor) for processor in transformer.attn_processors.values()} == {FluxAttnProcessor}
    assert list(transformer.state_dict()) == names


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Flux1Denoiser:
    """With an InstantX adapter of drawn weights and the packed XLabs adapter."""
    file = _saved(tmp_path_factory.mktemp("instantx"), INSTANTX)
    return Flux1Denoiser(FLUX, {"instantx-ip-adapter-mini": partial(InstantXAdapter, path=file), XLABS: ATTACH[XLABS]}, torch_threads=1)


def _person(name: str) -> IdentityTokens:
    tokens = named_tensor(f"{name}'s InstantX tokens", 1, INSTANTX.tokens, INSTANTX.token_dim)
    return IdentityTokens("instantx-ip-adapter-mini", tokens, tokens[:, :0])


def test_pictures_with_it_without_it_and_beside_xlabs(mini: Flux1Denoiser) -> None:
    base = mini.draw(spec(), texts()).picture
    ada = mini.draw(spec(IdentityRequest(method=METHOD)), texts(), [_person("Ada")]).picture
    both = mini.draw(spec(IdentityRequest(method=METHOD), request(XLABS)), texts(), [_person("Ada"), xlabs_person("Bruno")]).picture
    silent = mini.draw(spec(IdentityRequest(method=METHOD, weight=0.0)), texts(), [_person("Ada")]).picture
    assert (silent == base).all()
    assert (ada != base).mean() > 0.2 and (both != ada).mean() > 0.2
    assert (mini.draw(spec(), texts()).picture == base).all()


def test_the_negative_pass_is_one_without_the_adapter(mini: Flux1Denoiser) -> None:
    """Where true CFG acts alone, because the window is over, nobody's silence and nobody at all are the same."""
    late = IdentityRequest(method=METHOD, start=0.99)
    with_nobody = mini.draw(spec(late, true_cfg_scale=2.0), texts(), [_person("Ada")]).picture
    assert (with_nobody == mini.draw(spec(true_cfg_scale=2.0), texts()).picture).all()
    acting = mini.draw(spec(IdentityRequest(method=METHOD), true_cfg_scale=2.0), texts(), [_person("Ada")]).picture
    assert (acting != with_nobody).mean() > 0.2
