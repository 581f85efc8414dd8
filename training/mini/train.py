"""`python -m training.mini.train`: the embedded models, from nothing, by one command.

Renders the character world and trains every model of the pack on it, stage by stage, on one GPU (some stages also on several,
under torchrun). Stages that are done are skipped; a stage that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from training.mini.assemble import assemble, refuse_existing_pack
from training.mini.exchange import export_files, import_files
from training.mini.generator.context import Context
from training.mini.optimise import Recipe, main_process
from training.mini.stages import STAGES, Stage, chosen, seconds_of
from training.mini.workspace import Workspace

_EXAMPLES = """examples:
  everything, on one GPU:             python -m training.mini.train --minutes 45 --out models/mini
  try the recipe on a CPU:            python -m training.mini.train --smoke --out /tmp/pack
  one stage, its result to travel:    python -m training.mini.train --stages flux --minutes 9 --workspace w --export parts
  and on another machine:             python -m training.mini.train --import parts --workspace w --stages pulid --minutes 6
  the transformer on three GPUs:      torchrun --nproc-per-node 3 -m training.mini.train --stages flux --minutes 9 --workspace w
"""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "training.mini.train", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=45, help="time for all chosen stages together, compilation not counted (default 45)"
    )
    parser.add_argument("--out", type=Path, help="folder of the finished pack, e.g. models/mini; without it, only the stages run")
    parser.add_argument("--overwrite", action="store_true", help="replace a pack that --out already holds")
    parser.add_argument("--stages", help="comma-separated; all by default. Run with --stages help to see them")
    parser.add_argument(
        "--workspace", type=Path, help="where stages keep their results and checkpoints (default: OUT.work, or a temporary folder)"
    )
    parser.add_argument(
        "--import",
        dest="imports",
        type=Path,
        action="append",
        default=[],
        help="a folder of parts to unpack into the workspace first; may be repeated",
    )
    parser.add_argument("--export", type=Path, help="write the chosen stages' results into this folder, in files of at most 16 MiB")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="every stage at toy size, a few steps each: proves that the recipe runs")
    parser.add_argument("--again", action="store_true", help="run the chosen stages even if the workspace says they are done")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    try:
        return _run(options)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"training.mini.train: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.stages == "help":
        print("\n".join(f"{s.name:15s} {s.minutes:4.1f} min of 45   makes {', '.join(s.makes)}" for s in STAGES))
        return 0
    stages = chosen(options.stages)
    if options.out is not None:
        refuse_existing_pack(options.out, options.overwrite)
    device, rank = _join_processes(options.device)
    workspace = Workspace(_workspace_folder(options), writes=rank == 0)
    for folder in options.imports:
        import_files(folder, workspace.folder)
    context = Context(workspace, device, options.smoke, rank)
    for stage in stages:
        if workspace.finished(stage.name) and not options.again:
            print(f"{stage.name}: already done", flush=True)
            continue
        _run_stage(stage, context, Recipe(seconds_of(stage, stages, options.minutes), stage.learning_rate, smoke=options.smoke))
    if main_process() and options.export is not None:
        names = {name for stage in stages for name in stage.makes} | {f"{stage.name}.json" for stage in stages}
        pieces = export_files([workspace.folder / name for name in names], options.export)
        print(f"exported {len(pieces)} files to {options.export}")
    if main_process() and options.out is not None:
        assemble(workspace, options.out, options.overwrite)
    return 0


def _run_stage(stage: Stage, context: Context, recipe: Recipe) -> None:
    for name in stage.needs:
        if not (context.workspace.folder / name).is_file():
            raise FileNotFoundError(
                f"stage {stage.name} needs {name}, which is not in {context.workspace.folder}: run the stage that makes it, or --import it"
            )
    if dist.is_initialized() and not stage.parallel:
        raise ValueError(f"stage {stage.name} runs on one GPU: leave torchrun away")
    torch.manual_seed(1000 * len(stage.name) + context.rank)
    started = time.monotonic()
    facts = stage.run(context, recipe)
    context.workspace.note(
        stage.name, {**facts, "wall_seconds": round(time.monotonic() - started, 1), "device": _device_name(context.device)}
    )
    if dist.is_initialized():
        dist.barrier()
    if main_process():
        print(f"{stage.name}: done in {time.monotonic() - started:.0f} s", flush=True)


def _workspace_folder(options: argparse.Namespace) -> Path:
    if options.workspace is not None:
        return Path(options.workspace)
    if options.out is not None:
        return Path(options.out).with_name(Path(options.out).name + ".work")
    return Path(tempfile.mkdtemp(prefix="likeness-mini-"))


def _join_processes(device: str) -> tuple[torch.device, int]:
    """This process's device and rank; joins the others under torchrun."""
    _prepare(torch.device(device))
    if "WORLD_SIZE" not in os.environ:
        return torch.device(device), 0
    local = int(os.environ["LOCAL_RANK"])
    if device.startswith("cuda"):
        torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl")
        return torch.device("cuda", local), dist.get_rank()
    dist.init_process_group("gloo")
    return torch.device("cpu"), dist.get_rank()


def _prepare(device: torch.device) -> None:
    """TF32 where autocast doesn't reach; no cuDNN attention (its compiled backward crashed on torch 2.11); compiler limits that
    fit a handful of fixed shapes."""
    if device.type == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))
        return
    from torch import _dynamo as dynamo

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)
    dynamo.config.recompile_limit = 64
    dynamo.config.automatic_dynamic_shapes = False


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    raise SystemExit(main())
