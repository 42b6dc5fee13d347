import numpy as np
import pytest
import torch
from torch import nn

from efficient_detr.modeling.attention import DeformableDecoderAttention
from efficient_detr.structures import DecoderOutput, DetectorOutput, TokenSelection
from efficient_detr.visualization.tokens import (
    TokenExample,
    collect_token_examples,
    layers_keeping_tokens,
    light_kept_tokens,
    light_values,
    save_token_maps,
    save_tokens,
    token_maps_figure,
    tokens_figure,
)
from tests.tiny_models import random_tokens

SHAPES = [(2, 3), (1, 2)]  # tokens 0 to 5 and 6 to 7


def selection(indices, counts):
    return TokenSelection(
        indices=[torch.tensor(layer) for layer in indices],
        counts=torch.tensor(counts),
        scores=torch.zeros(len(counts), 8),
        level_logits=[],
    )


class TestLayersKeepingTokens:
    def test_counts_layers_by_level_row_and_column(self):
        kept = selection([[[5, 0, 6]], [[5, 6]], [[5]]], counts=[8])
        fine, coarse = layers_keeping_tokens(kept, SHAPES, 0)
        np.testing.assert_array_equal(fine, [[1, 0, 0], [0, 0, 3]])
        np.testing.assert_array_equal(coarse, [[2, 0]])

    def test_fillers_of_smaller_images_do_not_count(self):
        kept = selection([[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [4, 5]]], counts=[4, 1])
        fine, coarse = layers_keeping_tokens(kept, SHAPES, 1)
        np.testing.assert_array_equal(fine, [[0, 0, 0], [0, 2, 0]])
        np.testing.assert_array_equal(coarse, [[0, 0]])


class TestLightKeptTokens:
    def cells(self, picture, rows, columns):
        """Mean brightness of each cell, leaving out the border of a cell."""
        height, width = picture.shape[0] // rows, picture.shape[1] // columns
        return np.array(
            [
                [
                    picture[
                        y * height + 3 : (y + 1) * height - 3, x * width + 3 : (x + 1) * width - 3
                    ].mean()
                    for x in range(columns)
                ]
                for y in range(rows)
            ]
        )

    @pytest.mark.parametrize("value", [0, 90, 255])
    def test_kept_cells_are_brighter_than_dropped_ones(self, value):
        image = np.full((20, 30, 3), value, dtype=np.uint8)
        counts = np.array([[1, 0, 0], [0, 0, 2]])
        picture = light_kept_tokens(image, counts, 2, (20, 30), longer_side=300)
        assert picture.shape == (200, 300, 3)
        cells = self.cells(picture, 2, 3)
        assert cells[counts > 0].min() > cells[counts == 0].max() + 20

    def test_the_colour_tells_the_number_of_layers(self):
        image = np.full((10, 30, 3), 128, dtype=np.uint8)
        picture = light_kept_tokens(image, np.array([[1, 2, 3]]), 3, (10, 30), longer_side=300)
        colours = [tuple(picture[50, x]) for x in (50, 150, 250)]
        assert len(set(colours)) == 3

    def test_dropped_cells_are_grey(self):
        image = np.full((10, 20, 3), (200, 20, 20), dtype=np.uint8)
        picture = light_kept_tokens(image, np.array([[0, 1]]), 1, (10, 20), longer_side=200)
        dropped, kept = picture[50, 50].astype(int), picture[50, 150].astype(int)
        assert np.ptp(dropped) == 0
        assert np.ptp(kept) > 50

    def test_padding_is_left_out(self):
        """An image of 40 x 40 in a batch of 40 x 80: the right half of the tokens is padding."""
        image = np.full((40, 40, 3), 128, dtype=np.uint8)
        counts = np.array([[1, 0, 1, 1]])  # each token is 20 pixels wide
        picture = light_kept_tokens(image, counts, 1, (40, 80), longer_side=200)
        assert picture.shape == (200, 200, 3)
        left, right = picture[:, 10:90].mean(), picture[:, 110:190].mean()
        assert left > right + 50

    def test_an_image_may_end_inside_a_token(self):
        """30 of 80 pixels at 4 tokens: one token and a half are seen."""
        image = np.full((20, 30, 3), 128, dtype=np.uint8)
        picture = light_kept_tokens(image, np.array([[0, 1, 0, 0]]), 1, (20, 80), longer_side=300)
        assert picture[:, :195].mean() + 50 < picture[:, 205:].mean()


class TestLightValues:
    def test_higher_values_are_brighter(self):
        image = np.full((10, 30, 3), 128, dtype=np.uint8)
        picture = light_values(image, np.array([[0.0, 0.4, 1.0]]), (10, 30), longer_side=300)
        brightness = [picture[50, x].astype(int).sum() for x in (50, 150, 250)]
        assert brightness == sorted(brightness) and brightness[0] + 100 < brightness[2]

    def test_padding_is_left_out(self):
        image = np.full((40, 40, 3), 128, dtype=np.uint8)
        values = np.array([[1.0, 0.0, 1.0, 1.0]])  # each token is 20 pixels wide
        picture = light_values(image, values, (40, 80), longer_side=200)
        assert picture.shape == (200, 200, 3)
        assert (picture[100, 50] != picture[100, 150]).any()


class Detector(nn.Module):
    """Keeps token 0 of every image in its only layer."""

    def __init__(self, select):
        super().__init__()
        self.select = select

    def forward(self, images, padding_mask):
        batch = len(images)
        boxes = torch.zeros(1, batch, 2, 4)
        decoder = DecoderOutput(torch.zeros(1, batch, 2, 3), boxes, boxes)
        kept = selection([[[0]] * batch], [1] * batch) if self.select else None
        return DetectorOutput(decoder=decoder, memory=random_tokens(SHAPES), selection=kept)


class Model(nn.Module):
    def __init__(self, *, select=True, input_format="RGB"):
        super().__init__()
        self.detector = Detector(select)
        self.input_format = input_format
        self.modes = []

    def forward(self, batched_inputs):
        self.modes.append(self.training)
        images = torch.zeros(len(batched_inputs), 3, 32, 48)
        self.detector(images, torch.zeros(len(batched_inputs), 32, 48, dtype=torch.bool))
        return [{} for _ in batched_inputs]


def inputs(*sizes):
    return [{"image": torch.full((3, *size), 7, dtype=torch.uint8)} for size in sizes]


class TestCollect:
    def test_examples_hold_the_unpadded_image_and_its_tokens(self):
        model = Model().train()
        examples = collect_token_examples(model, inputs((32, 40), (20, 48)))
        assert [example.image.shape for example in examples] == [(32, 40, 3), (20, 48, 3)]
        assert {example.padded_size for example in examples} == {(32, 48)}
        assert {example.num_layers for example in examples} == {1}
        np.testing.assert_array_equal(examples[1].layer_counts[0], [[1, 0, 0], [0, 0, 0]])

    def test_the_model_evaluates_and_is_left_as_it_was(self):
        model = Model().train()
        collect_token_examples(model, inputs((32, 48)))
        assert model.modes == [False]
        assert model.training
        assert not model.detector._forward_hooks

    def test_channels_are_turned_to_rgb(self):
        image = torch.zeros(3, 32, 48, dtype=torch.uint8)
        image[0] = 255
        for input_format, expected in (("RGB", [255, 0, 0]), ("BGR", [0, 0, 255])):
            model = Model(input_format=input_format)
            (example,) = collect_token_examples(model, [{"image": image}])
            np.testing.assert_array_equal(example.image[0, 0], expected)

    def test_a_model_that_keeps_every_token_has_no_examples(self):
        assert collect_token_examples(Model(select=False), inputs((32, 48))) == []


class Attending(Model):
    """A model whose detector attends twice to the tokens, all at the centre of the image."""

    def __init__(self):
        super().__init__()
        attention = DeformableDecoderAttention(channels=8, num_heads=2, num_levels=2, num_points=1)
        nn.init.zeros_(attention.sampling_offsets.bias)
        self.detector.attention = attention
        self.detector.register_forward_hook(self.attend)

    def attend(self, detector, args, output):
        query = torch.zeros(len(args[0]), 5, 8)
        memory = output.memory
        for _ in range(2):
            detector.attention(query, query, torch.full((len(query), 5, 2), 0.5), memory, query)


class TestMaps:
    def test_scores_are_probabilities_by_level(self):
        (example,) = collect_token_examples(Model(), inputs((32, 48)))
        assert [scores.shape for scores in example.scores] == SHAPES
        np.testing.assert_array_equal(example.scores[0], 0.5)
        assert example.attention == []

    def test_attention_adds_up_over_the_layers(self):
        """Two layers of two heads and five queries spend 20, half of it on either level.

        The centre is row 1, column 1.5 of 2 x 3 tokens, and row 0.5, column 1 of 1 x 2: there, half
        falls off the lower border.
        """
        model = Attending()
        (example,) = collect_token_examples(model, inputs((32, 48)))
        np.testing.assert_allclose(example.attention[0], [[0, 0, 0], [0, 5, 5]])
        np.testing.assert_allclose(example.attention[1], [[0, 5]])
        assert not model.get_submodule("detector.attention")._forward_pre_hooks

    def test_there_are_three_rows_for_each_image(self, tmp_path):
        examples = collect_token_examples(Attending(), inputs((32, 48))) * 2
        figure = token_maps_figure(examples)
        titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
        rows = ["scores", "attention of the decoder", "kept tokens"]
        assert titles == [t for row in rows for t in (row, "level 1", "level 2")] * 2
        notes = {text.get_text() for axis in figure.axes for text in axis.texts}
        # 10 of 15 and 5 of 15.
        assert {"67% of the attention", "33% of the attention", "up to 0.50"} <= notes
        path = save_token_maps(examples, tmp_path / "maps.png")
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_without_attention_there_are_two(self):
        figure = token_maps_figure(collect_token_examples(Model(), inputs((32, 48))))
        titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
        assert titles == ["scores", "level 1", "level 2", "kept tokens", "level 1", "level 2"]


class TestFigure:
    def example(self):
        generator = np.random.default_rng(0)
        return TokenExample(
            image=generator.integers(0, 255, (30, 40, 3), dtype=np.uint8),
            padded_size=(32, 48),
            layer_counts=[generator.integers(0, 3, (4, 6)), generator.integers(0, 3, (2, 3))],
            num_layers=2,
        )

    def test_there_is_a_row_for_each_image_and_a_panel_for_each_level(self):
        figure = tokens_figure([self.example(), self.example()])
        titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
        assert titles == ["image", "level 1", "level 2"] * 2

    def test_notes_count_the_tokens_without_padding(self):
        """30 x 40 of 32 x 48 pixels on 4 x 6 tokens of 8 pixels: 4 x 5 tokens."""
        counts = np.zeros((4, 6), dtype=np.int64)
        counts[3, 4] = 1  # the last token that the image reaches
        counts[:, 5] = 2  # padding
        example = TokenExample(np.zeros((30, 40, 3), dtype=np.uint8), (32, 48), [counts], 2)
        figure = tokens_figure([example])
        notes = [text.get_text() for axis in figure.axes for text in axis.texts]
        assert "1 of 4 x 5 tokens" in notes

    def test_the_file_is_a_picture(self, tmp_path):
        path = save_tokens([self.example()], tmp_path / "new" / "tokens.png")
        assert path.read_bytes().startswith(b"\x89PNG")
        assert [file.name for file in path.parent.iterdir()] == ["tokens.png"]
