"""What stands between the tables of `docs/model_zoo.md`."""

INTRODUCTION = """\
# Model zoo

What the full-size configs cost here, beside what is published about them. Written by `make zoo`.
A number that nobody has published or measured is a "-".

**Quoted** figures are the authors' or those of whoever is named in [Accuracy,
quoted](#accuracy-quoted); **measured** ones come from running code here. No column has both.

![AP by GFLOPs](zoo_accuracy.png)

*Quoted AP by measured GFLOPs, which those of hollow points have with random weights only. An arrow
leads from a model to one that makes its attention cheaper and has the same training, ACT's apart,
which starts from the weights of DETR-DC5. Otherwise trainings differ in length: what stands higher
may have trained longer.*

## How to read the tables

* **AP** is that of boxes on COCO val2017, in percent, after as many epochs of COCO as stand
  beside it, from a backbone trained on ImageNet.
* **Parameters**, measured, are all of them, frozen ones included, with 80 classes. Most authors
  have 91, and some count the trainable ones only.
* **GFLOPs**, measured, are 10^9 multiply-adds for one random image of 800x1333 pixels, without
  padding: 1 multiply-add is 1. Sampling a value between four cells is 4; norms count a few a
  value. Activations, additions, softmax, sorting and indexing count nothing. A fused operator
  counts as much as those that it replaces.
* **GFLOPs**, quoted, are mostly of smaller images, the mean over 100 of COCO or what seems to be
  it: compare them with the columns of [GFLOPs, quoted and
  measured](#gflops-quoted-and-measured), not with their neighbour.
* **ours / authors' code** divides our GFLOPs by those of the authors' own code for the same
  image, counted the same way. [Where the count
  differs](#where-the-count-differs-from-the-authors-code) gives the reasons.
* **encoder GFLOPs**: "a + b" is the encoder and what selects its tokens.
* A **\\*** points to what is said about the model below its table.
* **latency / baseline's** compares times of one run in which all models took turns; the baseline
  is the dense model named beside it. Below 1, the model is faster. On a CPU times are computing
  times of all threads.
"""

MEASURED_ACCURACY = """\
## Accuracy, measured

Of trainings with this code. The quickstart (`make quickstart`) trains a small Focus-DETR on
generated pictures of digits: its AP says that training works, and nothing about COCO. GFLOPs are
means over its own, small images.
"""

QUOTED_ACCURACY = """\
## Accuracy, quoted

All on COCO val2017, in percent, with the epochs and the parameters that the same source gives. The
tables above have the AP and the epochs of a config's first row, and the first parameters.
"""

AUTHORS_CODE = """\
## Where the count differs from the authors' code

GFLOPs of one random image of 800x1333 pixels, all measured: the authors' code by fvcore, with
handlers for the attention operators that fvcore skips; ours by `tools/analyze_model.py`. Encoders
are without the selection of tokens. What the reasons leave is unexplained: 0.003 and 0.005 of SMCA,
in the decoder. The multi-scale SMCA has no public code; its row is about a reconstruction after the
paper, whose decoder costs 0.23 more than ours for reasons that were not looked for.
"""

PUBLISHED_GFLOPS = """\
## GFLOPs, quoted and measured

An image of 850x1040 pixels stands for the mean over 100 images of COCO, because the authors' code
of Deformable DETR needs on it what they publish; how near it comes for the others is in the table.
Where a figure is of something else, or nobody says of what, there is nothing to compare.
"""

DATA_DEPENDENCE = """\
## What depends on weights and image

Measured with random weights on a random image. How many tokens an encoder layer updates follows
from the config; which ones does not change the cost. Clusters are made of queries, and queries of
random weights become alike from layer to layer. So clusters are few, and GFLOPs and times of ACT
lower than with trained weights, for which a fifth of the transformer is the saving quoted above:
`tools/measure_clusters.py` measures the clusters of yours ([act.md](act.md)).
"""

ENCODER_COMPARISON = """\
## Which attention pays where

![GFLOPs and time of encoders by image size](zoo_encoder.png)

*Encoders of six layers, with the selection of their tokens, random weights. Dense and clustered
attention see one map of stride 16; the others see four maps of strides 8 to 64, five times as
many tokens. Feed-forward networks of DETR, DINO and Focus-DETR are twice as wide as those of
Deformable and Sparse DETR. Clusters are those of random weights, which are fewer than those of
trained ones.*

The picture as a table, GFLOPs and milliseconds, all measured:
"""

PROVENANCE = """\
## Where the numbers come from

    make zoo

runs `tools/analyze_model.py` for each config, `tools/benchmark.py` for all configs in turns, both
again at the image sizes of the picture, the quickstart, and `python -m tools.write_model_zoo`.
What is there in `output/zoo/` is not measured again. Quoted figures stand in
`tools/published_figures.yaml`, each with its source.
"""
