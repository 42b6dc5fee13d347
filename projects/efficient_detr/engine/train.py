"""Training and evaluation of a LazyConfig: what ``train_net.py`` runs."""

import argparse
import json
import logging
import math
import os
from functools import partial
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase, create_ddp_model, default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from efficient_detr.engine.building import build_checkpointer, build_model
from efficient_detr.engine.checkpointer import AtomicCheckpointer
from efficient_detr.engine.checks import check_num_classes, dataset_names
from efficient_detr.engine.trainer import AMP_DTYPES, Trainer
from efficient_detr.evaluation import build_evaluators
from efficient_detr.files import replaced_file

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, float]]


def run(cfg: DictConfig, args: argparse.Namespace) -> Results | None:
    """Set up logging and seeds, then train, or evaluate with ``args.eval_only``.

    Args:
        cfg: a checked config, see :func:`do_train`.
        args: arguments of Detectron2's ``default_argument_parser``.

    Returns:
        The results of the evaluation (empty on other processes than the main one); None after
        training.
    """
    _fix_seed(cfg)
    default_setup(cfg, args)
    set_up_logging(cfg.train.output_dir)
    if not args.eval_only:
        do_train(cfg, args)
        return None
    model = _build_model(cfg)
    build_checkpointer(cfg, model, args.config_file).load(cfg.train.init_checkpoint)
    return do_test(cfg, _distribute(model, cfg))


def set_up_logging(output_dir: str | None = None) -> None:
    """Show this package's messages like Detectron2's: on the terminal and in ``log.txt``.

    Args:
        output_dir: folder of ``log.txt``; None for the terminal only.
    """
    # Unlike Detectron2's loggers it also passes its messages on, as libraries usually do.
    setup_logger(
        output_dir,
        distributed_rank=comm.get_rank(),
        name="efficient_detr",
        enable_propagation=True,
    )


def do_train(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Train the model of a config.

    Args:
        cfg: the config. What is read of it, apart from what its parts read themselves:

            - ``model``: builds the meta-architecture; ``model.num_classes`` is compared with the
              data sets
            - ``dataloader.train``: builds an endless iterable of batches; with
              :func:`efficient_detr.data.loader.build_train_loader` a resumed run sees the batches
              that an uninterrupted one sees
            - ``dataloader.train.dataset.names``, ``dataloader.test.dataset.names``: data sets whose
              classes are checked (optional)
            - ``dataloader.test``, ``dataloader.evaluator``: see :func:`do_test`
            - ``optimizer``: builds the optimizer; ``optimizer.params.model`` is set to the model
            - ``lr_multiplier``: builds an fvcore ``ParamScheduler`` of the progress in [0, 1]
            - ``train.output_dir`` (str): where everything is written
            - ``train.init_checkpoint`` (str): weights to start from, '' for none, in any format
              of `efficient_detr.checkpoint.formats`; rows of classes that the file does not have,
              and queries of another number, start anew
            - ``train.allow_partial_checkpoint`` (bool): take what fits of any other file, too
              (optional)
            - ``train.max_iter`` (int): iterations
            - ``train.seed`` (int): seed of everything random; negative for a random one
            - ``train.device`` (str): 'cuda' or 'cpu'
            - ``train.amp.enabled`` (bool), ``train.amp.dtype`` ('float16' or 'bfloat16')
            - ``train.clip_max_norm`` (float): largest L2 norm of the gradient, 0 for no clipping
            - ``train.ddp``: keyword arguments of ``create_ddp_model``
            - ``train.checkpointer``: ``period`` and ``max_to_keep`` of ``PeriodicCheckpointer``
            - ``train.eval_period``, ``train.log_period`` (int): in iterations
            - ``train.flops_images`` (int): see :func:`do_test`
            - ``train.cudnn_benchmark``, ``train.float32_precision``: see Detectron2's
              ``default_setup``
        args: command line; ``args.resume`` continues from the last checkpoint in
            ``train.output_dir`` with its optimizer, schedule, iteration, random numbers and data.

    Raises:
        UserError: for data, weights or losses that make training impossible.
    """
    # Data first: its faults are the likeliest, and a model takes longer to build.
    train_loader = instantiate(cfg.dataloader.train)
    for split in ("train", "test"):
        for name in dataset_names(cfg, split):
            check_num_classes(cfg, name)
    model = _build_model(cfg)
    with open_dict(cfg):
        cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trainer = Trainer(
        _distribute(model, cfg),
        train_loader,
        optimizer,
        clip_max_norm=cfg.train.clip_max_norm or 0.0,
        amp_dtype=AMP_DTYPES[cfg.train.amp.dtype] if cfg.train.amp.enabled else None,
        seed=cfg.train.seed,
    )
    checkpointer = build_checkpointer(
        cfg, trainer.model, args.config_file, cfg.train.output_dir, trainer=trainer
    )
    trainer.register_hooks(_build_hooks(cfg, trainer, checkpointer))
    start_iter = _restore(cfg, args, trainer, checkpointer)
    trainer.train(start_iter, cfg.train.max_iter)


def do_test(cfg: DictConfig, model: nn.Module) -> Results:
    """Evaluate a model on the test set of a config.

    The tables go to the log, the results also to ``train.output_dir/results.json``.

    Args:
        cfg: the config. Read are ``dataloader.test`` (builds the loader), ``dataloader.evaluator``
            (builds a Detectron2 evaluator; absent or null for no evaluation), ``train.output_dir``
            and ``train.flops_images``, the number of test images whose FLOPs are averaged.
        model: the model, on its device; it may be wrapped for distributed training.

    Returns:
        For each task a dict of metrics; empty if there is no evaluator, or on other processes than
        the main one.
    """
    if cfg.dataloader.get("evaluator") is None:
        logger.warning("The config has no dataloader.evaluator: nothing is evaluated.")
        return {}
    # Built first, because loading the data set fills the metadata that the evaluator reads.
    test_loader = instantiate(cfg.dataloader.test)
    for name in dataset_names(cfg, "test"):
        check_num_classes(cfg, name)
    evaluators = build_evaluators(
        instantiate(cfg.dataloader.evaluator),
        model.module if isinstance(model, DistributedDataParallel) else model,
        flops_images=cfg.train.flops_images,
    )
    results: Results = inference_on_dataset(model, test_loader, evaluators)
    if comm.is_main_process():
        print_csv_format(results)
        save_results(results, os.path.join(cfg.train.output_dir, "results.json"))
    return results


def save_results(results: Results, path: str) -> None:
    """Write results as JSON, with null for numbers that do not exist (e.g. AP of no objects).

    Args:
        results: dicts of metrics, nested to any depth.
        path: file to write; an existing one is replaced only by a complete one.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with replaced_file(path) as partial_path:
        partial_path.write_text(json.dumps(_without_nan(results), indent=2), encoding="utf-8")
    logger.info("Results are in %s", path)


def _fix_seed(cfg: DictConfig) -> None:
    """Replace a negative seed by a random one that all processes share and the log shows."""
    with open_dict(cfg):
        if OmegaConf.select(cfg, "train.seed", default=-1) < 0:
            cfg.train.seed = comm.shared_random_seed()


def _build_model(cfg: DictConfig) -> nn.Module:
    model = build_model(cfg)
    model.to(torch.device(cfg.train.device))
    logger.info("Model:\n%s", model)
    return model


def _distribute(model: nn.Module, cfg: DictConfig) -> nn.Module:
    options = dict(OmegaConf.select(cfg, "train.ddp", default={}))
    # DistributedDataParallel takes device ids of GPUs only.
    if not str(cfg.train.device).startswith("cuda"):
        options["device_ids"] = None
    distributed: nn.Module = create_ddp_model(model, **options)
    return distributed


def _build_hooks(
    cfg: DictConfig, trainer: Trainer, checkpointer: AtomicCheckpointer
) -> list[HookBase]:
    """Timing, schedule, checkpoints, evaluation and writers, in the order they must run.

    The schedule steps before the checkpoint is written, so that it holds the next learning rate;
    the writers come last, so that they see the results of an evaluation.
    """
    built: list[HookBase] = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
    ]
    if comm.is_main_process():
        built.append(hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer))
    built.append(hooks.EvalHook(cfg.train.eval_period, partial(do_test, cfg, trainer.model)))
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        built.append(hooks.PeriodicWriter(writers, period=cfg.train.log_period))
    return built


def _restore(
    cfg: DictConfig, args: argparse.Namespace, trainer: Trainer, checkpointer: AtomicCheckpointer
) -> int:
    """Load the last checkpoint or the initial weights; return the iteration to start with."""
    output_dir = cfg.train.output_dir
    checkpointer.remove_partial_files()
    if args.resume and checkpointer.has_checkpoint():
        checkpointer.resume(checkpointer.get_checkpoint_file())
        # The checkpoint names the iteration that had just been finished.
        start_iter = int(trainer.iter) + 1
        if hasattr(trainer.data_loader, "start_iteration"):
            trainer.data_loader.start_iteration = start_iter
        else:
            logger.warning(
                "dataloader.train starts its batches anew: only build_train_loader goes on where "
                "the checkpoint ended."
            )
        return start_iter
    if args.resume:
        logger.warning("No checkpoint in %s: training starts at iteration 0.", output_dir)
    elif checkpointer.has_checkpoint():
        logger.warning(
            "%s holds checkpoints of an earlier run; --resume goes on there.", output_dir
        )
    checkpointer.load(cfg.train.init_checkpoint, checkpointables=[])
    return 0


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
