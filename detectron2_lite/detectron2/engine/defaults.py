"""The usual beginning of a training script."""

import argparse
import os
import sys
from typing import Any

import torch
from detectron2.config import LazyConfig
from detectron2.utils import comm, events
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel


def create_ddp_model(
    model: nn.Module, *, fp16_compression: bool = False, **kwargs: Any
) -> nn.Module:
    """Wraps a model for distributed training; a single process gets the model itself.

    ``kwargs`` go to DistributedDataParallel: a model on the CPU needs ``device_ids=None``.
    """
    if comm.get_world_size() == 1:
        return model
    ddp = DistributedDataParallel(model, **{"device_ids": [comm.get_local_rank()], **kwargs})
    if fp16_compression:
        ddp.register_comm_hook(state=None, hook=fp16_compress_hook)
    return ddp


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """The options that Detectron2's scripts share, followed by ``path.key=value`` overrides."""
    example = f"Example: {sys.argv[0]} --config-file FILE --num-gpus 8 train.output_dir=./output"
    parser = argparse.ArgumentParser(epilog=epilog or example)
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
    add("opts", nargs=argparse.REMAINDER, help="overrides of the config, such as train.seed=1")
    return parser


def default_setup(cfg: DictConfig, args: Any) -> None:
    """Sets up loggers, records the environment and the config, and seeds this process.

    Reads ``train.output_dir`` (log.txt and config.yaml go there), ``train.seed`` (plus the rank;
    negative is random), ``train.cudnn_benchmark`` and ``train.float32_precision`` of the config,
    and ``config_file`` and ``eval_only`` of the arguments, as far as they exist.
    """
    train = OmegaConf.select(cfg, "train", default={})
    output_dir = train.get("output_dir")
    rank = comm.get_rank()
    setup_logger(output_dir, rank, name="fvcore")
    logger = setup_logger(output_dir, rank)
    logger.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    logger.info("Environment info:\n%s", collect_env_info())
    logger.info("Command line arguments: %s", args)
    if config_file := getattr(args, "config_file", ""):
        with PathManager.open(config_file) as file:
            logger.info("Contents of args.config_file=%s:\n%s", config_file, file.read())
    if comm.is_main_process() and output_dir:
        path = os.path.join(output_dir, "config.yaml")
        LazyConfig.save(cfg, path)
        logger.info("Full config saved to %s", path)
    seed = train.get("seed", -1)
    seed_all_rng(None if seed < 0 else seed + rank)
    if not getattr(args, "eval_only", False):  # trying algorithms costs more than it saves there
        torch.backends.cudnn.benchmark = train.get("cudnn_benchmark", False)
    precision = train.get("float32_precision", "")
    if precision and torch.cuda.is_available():
        logger.info("Set fp32 precision to %s", precision)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"


def default_writers(output_dir: str, max_iter: int | None = None) -> list[events.EventWriter]:
    """Writers to the log, to ``metrics.json`` and to TensorBoard files in ``output_dir``."""
    PathManager.mkdirs(output_dir)
    json_writer = events.JSONWriter(os.path.join(output_dir, "metrics.json"))
    printer = events.CommonMetricPrinter(max_iter)
    return [printer, json_writer, events.TensorboardXWriter(output_dir)]
