"""The generator's arithmetic: packing, positions, losses, and a training forward that equals the stock one."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from training.mini.flux_folder import flux_config
from training.mini.generator.flow import face_weights, flow_loss, noised, pack, position_ids, predicted_clean, shifted, unpack
from training.mini.generator.forward import Prompt, TrainableFlux, initialise


def test_packing_is_the_stock_pipelines_and_reversible() -> None:
    latents = torch.randn(2, 16, 8, 12)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 8, 12))
    assert torch.equal(unpack(pack(latents), 8, 12), latents)


def test_positions_are_the_stock_pipelines() -> None:
    stock = FluxPipeline._prepare_latent_image_ids(1, 4, 6, torch.device("cpu"), torch.float32)
    ours = position_ids(8, 12, 5, "cpu")
    assert torch.equal(ours[5:], stock)
    assert not ours[:5].any()


def test_the_shift_is_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    sigmas = torch.linspace(1, 0.1, 10)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    torch.testing.assert_close(scheduler.sigmas[:-1], shifted(sigmas, 2.0))


def test_the_true_velocity_has_no_loss_and_gives_the_clean_latents_back() -> None:
    clean, noise, times = torch.randn(3, 6, 4), torch.randn(3, 6, 4), torch.tensor([0.1, 0.5, 0.9])
    velocity = noise - clean
    assert flow_loss(velocity, clean, noise) == 0
    torch.testing.assert_close(predicted_clean(noised(clean, noise, times), velocity, times), clean)


def test_weights_favour_the_face_and_keep_the_mean() -> None:
    weights = face_weights(torch.tensor([[-0.5, -0.5, 0.5, 0.5]]), 16, 16).view(8, 8)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[4, 4] / weights[0, 0], torch.tensor(3.0))


def test_the_training_forward_equals_the_stock_forward() -> None:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(**flux_config())
    tokens, states, pooled = torch.randn(2, 16, 64), torch.randn(2, 5, 128), torch.randn(2, 128)
    times, guidance = torch.tensor([0.3, 0.8]), torch.tensor([1.0, 3.0])
    ids = position_ids(8, 8, 5, "cpu")
    with torch.no_grad():
        stock = transformer(
            hidden_states=tokens, encoder_hidden_states=states, pooled_projections=pooled, timestep=times, guidance=guidance,
            txt_ids=ids[:5], img_ids=ids[5:], return_dict=False,
        )[0]  # fmt: skip
        ours = TrainableFlux(transformer, 8, 5, compiled=False).velocity(tokens, Prompt(states, pooled), times, guidance)
    assert (ours - stock).norm() / stock.norm() < 1e-5


def test_an_initialised_transformer_predicts_nothing_yet() -> None:
    transformer = FluxTransformer2DModel(**flux_config())
    initialise(transformer)
    flux = TrainableFlux(transformer, 8, 5, compiled=False)
    with torch.no_grad():
        velocity = flux.velocity(torch.randn(1, 16, 64), Prompt(torch.randn(1, 5, 128), torch.randn(1, 128)), torch.ones(1), torch.ones(1))
    assert velocity.abs().max() < 1e-6
