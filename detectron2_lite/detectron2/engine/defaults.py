"""The usual beginning of a training script."""

import argparse
import os
import sys
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2._absent import absent_name_getter
from detectron2.config import LazyConfig
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

__all__ = ["create_ddp_model", "default_argument_parser", "default_setup", "default_writers"]
__getattr__ = absent_name_getter(__name__)


def create_ddp_model(
    model: nn.Module, *, fp16_compression: bool = False, **kwargs: Any
) -> nn.Module:
    """Wraps the model for distributed training; a single process gets the model itself.

    Args:
        model: a model on the GPU of this process; one on the CPU needs ``device_ids=None``.
        fp16_compression: whether gradients travel in half precision.
        kwargs: arguments of DistributedDataParallel.
    """
    if comm.get_world_size() == 1:
        return model
    ddp = DistributedDataParallel(model, **{"device_ids": [comm.get_local_rank()], **kwargs})
    if fp16_compression:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        ddp.register_comm_hook(state=None, hook=default_hooks.fp16_compress_hook)
    return ddp


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """The options that Detectron2's scripts share, followed by ``path.key=value`` overrides."""
    script = sys.argv[0]
    epilog = epilog or (
        "Examples:\n\n"
        f"  {script} --config-file config.py --num-gpus 8 train.output_dir=./output\n"
        f"  {script} --config-file config.py --num-machines 2 --machine-rank 0 --dist-url URL\n"
    )
    parser = argparse.ArgumentParser(
        epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="path of the config file")
    add("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    add("--eval-only", action="store_true", help="evaluate, without training")
    add("--num-gpus", type=int, default=1, help="number of GPUs on each machine")
    add("--num-machines", type=int, default=1, help="number of machines")
    add("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    # A port per user that stays the same shows, by being taken, that an old run still lives.
    user = os.getuid() if hasattr(os, "getuid") else 1
    port = 2**15 + 2**14 + hash(user) % 2**14
    add("--dist-url", default=f"tcp://127.0.0.1:{port}", help="where the processes meet")
    add("opts", default=None, nargs=argparse.REMAINDER, help="overrides such as train.seed=1")
    return parser


def _select(cfg: DictConfig, *keys: str, default: Any = None) -> Any:
    """The value at the first of the keys that exists."""
    missing = object()
    values = (OmegaConf.select(cfg, key, default=missing) for key in keys)
    return next((value for value in values if value is not missing), default)


def default_setup(cfg: DictConfig, args: Any) -> None:
    """Sets up loggers, records the environment and the config, and seeds this process.

    Reads ``train.output_dir`` (log.txt and config.yaml go there), ``train.seed`` (plus the rank;
    negative is random), ``train.cudnn_benchmark`` and ``train.float32_precision``.

    Args:
        cfg: the whole config.
        args: parsed arguments; ``config_file`` and ``eval_only`` are used if they exist.
    """
    output_dir = _select(cfg, "OUTPUT_DIR", "output_dir", "train.output_dir")
    rank = comm.get_rank()
    writes = comm.is_main_process() and bool(output_dir)
    if writes:
        PathManager.mkdirs(output_dir)
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    logger = setup_logger(output_dir, distributed_rank=rank)
    logger.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    logger.info("Environment info:\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    config_file = getattr(args, "config_file", "")
    if config_file:
        with PathManager.open(config_file) as file:
            logger.info("Contents of args.config_file=%s:\n%s", config_file, file.read())
    if writes:
        path = os.path.join(output_dir, "config.yaml")
        LazyConfig.save(cfg, path)
        logger.info("Full config saved to %s", path)

    seed = _select(cfg, "SEED", "train.seed", default=-1)
    seed_all_rng(None if seed < 0 else seed + rank)
    if not getattr(args, "eval_only", False):  # trying algorithms costs more than it saves there
        torch.backends.cudnn.benchmark = _select(
            cfg, "CUDNN_BENCHMARK", "train.cudnn_benchmark", default=False
        )
    precision = _select(cfg, "FLOAT32_PRECISION", "train.float32_precision", default="")
    if precision:
        logger.info("Set fp32 precision to %s", precision)
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision(precision)
            torch.backends.cudnn.allow_tf32 = precision != "highest"


def default_writers(output_dir: str, max_iter: int | None = None) -> list[EventWriter]:
    """Writers to the log, to ``metrics.json`` and to TensorBoard files in ``output_dir``."""
    PathManager.mkdirs(output_dir)
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(os.path.join(output_dir, "metrics.json")),
        TensorboardXWriter(output_dir),
    ]
