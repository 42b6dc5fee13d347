"""Options of training and evaluation; `efficient_detr.engine.train.do_train` reads them."""

import torch

train = dict(
    # Checkpoints, log.txt, metrics.json, TensorBoard events, results.json and config.yaml go here.
    output_dir="./output",
    # Weights to start from, ours or in a published format (docs/checkpoints.md): a path, an https://
    # or a detectron2:// address; "" for none. A download is kept in a cache, and compared with the
    # SHA-256 in its name (detr-r50-e632da11.pth) or behind it (.../detr.pth#sha256=e632da11).
    # In training, classes that the file does not have and queries of another number start anew, and
    # the log says so; whatever else does not fit is an error. --resume goes before it.
    init_checkpoint="",
    # Take what fits of a file and leave the rest at its initial values; the log lists it.
    allow_partial_checkpoint=False,
    # Iterations; the factories in schedule.py count an epoch of COCO as 7,500 of them.
    max_iter=90000,
    # Seed of everything random: weights, order of the images, augmentation, noise. -1: random.
    seed=42,
    # "cuda", "cuda:0", "cpu".
    device="cuda" if torch.cuda.is_available() else "cpu",
    # Automatic mixed precision. bfloat16 runs on CPUs and on GPUs since Ampere; float16 also on
    # older GPUs, with loss scaling.
    amp=dict(enabled=False, dtype="bfloat16"),
    # The gradient is scaled down to this L2 norm; DETRs are trained with 0.1. 0: no clipping.
    clip_max_norm=0.1,
    # DistributedDataParallel. Frozen batch norm has no buffers to broadcast.
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    # A checkpoint every `period` iterations; the last `max_to_keep` are kept.
    checkpointer=dict(period=5000, max_to_keep=3),
    # Iterations between two evaluations (0: only at the end) and between two lines of the log.
    eval_period=5000,
    log_period=20,
    # Test images whose FLOPs are counted and averaged in an evaluation; 0: none.
    flops_images=10,
    # Let cuDNN time its algorithms for each image size: only worth it if all sizes are equal.
    cudnn_benchmark=False,
    # "highest", "high" (TF32) or "medium" for float32 products on GPUs; "": PyTorch's default.
    float32_precision="",
)
