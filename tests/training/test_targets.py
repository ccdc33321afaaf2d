"""Contracts between objective, backbone, mixing, data and teacher, and the targets of a batch."""

import pytest
import torch
import torch.nn.functional as F

from vitrail.data import MixToken, MixupCutMix
from vitrail.data.label_maps import token_targets
from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.models.heads import return_features
from vitrail.objectives import (
    CosubLoss,
    CrossEntropy,
    DistillationLoss,
    FeatureDistillation,
    Objective,
    TokenLabelingLoss,
)
from vitrail.training import TargetBuilder
from vitrail.training.targets import blend_ground_truth, check_contracts
from vitrail.types import Batch, LabelMap

TEACHER = frozenset({"teacher_logits", "teacher_features"})
MAPS = frozenset({"label_maps"})
NOTHING: frozenset[str] = frozenset()


class FeatureLoss(Objective):
    needs = frozenset({"teacher_features"})


class DecisionLoss(Objective):
    needs = frozenset({"outputs.decisions"})


class DepthLoss(Objective):
    needs = frozenset({"depth_maps"})


def check(model, objective, mixing=None, provided=NOTHING):
    check_contracts(create_model(model, 10, 32, depth=1), objective, mixing, provided)


@pytest.mark.parametrize(
    ("model", "objective", "mixing", "provided", "message"),
    [
        (
            *("deit_nano", TokenLabelingLoss(), None, MAPS),
            "TokenLabelingLoss needs token logits, which VisionTransformer does not have; set model.token_head",
        ),
        ("lvvit_t", TokenLabelingLoss(), None, NOTHING, "data.label_maps: not set, but TokenLabelingLoss needs token"),
        ("lvvit_t", CrossEntropy(), None, MAPS, "data.label_maps: CrossEntropy does not use label maps"),
        ("lvvit_t", CrossEntropy(), MixToken(), NOTHING, "mixing: MixToken needs token targets"),
        ("deit_nano", DistillationLoss(), None, NOTHING, "teacher: not set, but DistillationLoss needs a teacher"),
        ("deit_nano", FeatureLoss(), None, NOTHING, "teacher: not set, but FeatureLoss needs a teacher's features"),
        ("deit_nano", FeatureLoss(), None, MAPS, "teacher: not set, but FeatureLoss needs a teacher's features"),
        ("deit_nano", CrossEntropy(), None, TEACHER, "teacher: CrossEntropy does not use a teacher"),
        ("deit_nano", DistillationLoss(), None, TEACHER | MAPS, "data.label_maps: already contain a teacher's scores"),
        (
            "deit_nano",
            DecisionLoss(),
            None,
            NOTHING,
            "DecisionLoss needs outputs.decisions; VisionTransformer has cls",
        ),
        ("deit_nano", DepthLoss(), None, MAPS, "DepthLoss needs depth_maps, which nothing provides; known needs are"),
        ("deit_nano", CosubLoss(base=TokenLabelingLoss()), None, NOTHING, "CosubLoss needs token logits"),
    ],
)
def test_contracts__mismatch_is_refused_and_names_the_key(model, objective, mixing, provided, message):
    with pytest.raises(ConfigError, match=message):
        check(model, objective, mixing, provided)


class TokenTargets(Objective):
    """An objective of token targets that leaves the token logits unsaid."""

    needs = "token_targets"

    def forward(self, outputs, targets):
        return {"loss": outputs.cls.mean()}


class Silent(Objective):
    """A wrapper that does not declare the needs of what it wraps."""

    def __init__(self):
        super().__init__()
        self.inner = TokenLabelingLoss()


class Learned(Objective):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (TokenTargets(), "objective: TokenTargets needs token logits, which VisionTransformer does not have"),
        (Silent(), "objective: Silent contains TokenLabelingLoss, so it must also declare the need outputs.tokens"),
        (
            Learned(),
            "objective: Learned has parameters that nothing trains; name their modules in its attribute",
        ),
    ],
)
def test_contracts__objectives_of_somebody_else(objective, message):
    with pytest.raises(ConfigError, match=message):
        check("vit_nano", objective)


def test_contracts__optional_token_targets_without_token_logits():
    objective = CrossEntropy()
    objective.optional = frozenset({"token_targets"})
    check("vit_nano", objective)
    batch = Batch(torch.zeros(2, 3, 32, 32), torch.tensor([1, 2]), ["a", "b"])
    assert TargetBuilder()(batch, objective, 10, None).tokens is None
    with pytest.raises(ConfigError, match="does not use label maps"):
        check("vit_nano", objective, None, MAPS)


@pytest.mark.parametrize(
    ("objective", "provided"),
    [(TokenLabelingLoss(), MAPS), (CosubLoss(base=TokenLabelingLoss()), MAPS), (FeatureDistillation(), TEACHER)],
)
def test_contracts__patch_dropout_and_targets_of_patch_tokens_are_refused(objective, provided):
    model = create_model("lvvit_nano", 10, 64, token_head=True, patch_drop_rate=0.25)
    assert return_features(model)
    message = r"model.patch_drop_rate=0.25: drops patch tokens, and \w+ compares every patch token with its own target"
    with pytest.raises(ConfigError, match=message):
        check_contracts(model, objective, None, provided)
    check_contracts(model, CrossEntropy(), None, NOTHING)


def test_contracts__mixtoken_needs_a_backbone_that_mixes_tokens():
    model = create_model("convnext_atto", 10, token_head=True)
    with pytest.raises(ConfigError, match=r"mixing: MixToken needs a backbone that swaps tokens.*ConvNeXt"):
        check_contracts(model, TokenLabelingLoss(), MixToken(), MAPS)
    check_contracts(model, TokenLabelingLoss(), MixupCutMix(), MAPS)


@pytest.mark.parametrize(
    ("model", "objective", "mixing", "provided"),
    [
        ("lvvit_t", TokenLabelingLoss(), MixToken(), MAPS),
        ("lvvit_t", TokenLabelingLoss(token_weight=0), None, NOTHING),
        ("deit_nano", DistillationLoss(), MixupCutMix(), MAPS),
        ("deit_nano", DistillationLoss(), None, TEACHER),
        ("deit_nano", FeatureLoss(), None, TEACHER),
        ("deit_nano", torch.nn.Identity(), None, NOTHING),
    ],
)
def test_contracts__valid_combination(model, objective, mixing, provided):
    check(model, objective, mixing, provided)


def batch(mix=None, maps=True):
    torch.manual_seed(0)
    box = torch.tensor([[0.1, 0.2, 0.9, 0.8]]).expand(4, 4)
    classes = torch.rand(4, 5, 6, 6).argsort(1)[:, :2]
    label_map = LabelMap(3 * torch.randn(4, 2, 6, 6), classes, box, torch.zeros(4, dtype=torch.bool))
    return Batch(torch.randn(4, 3, 8, 8), torch.tensor([0, 3, 1, 4]), list("abcd"), label_map if maps else None, mix)


class Needs(Objective):
    def __init__(self, *needs):
        super().__init__()
        self.needs = frozenset(needs)


def test_targets__only_the_declared_ones():
    plain = TargetBuilder()(batch(), CrossEntropy(), 5, None)
    assert plain.cls.tolist() == [0, 3, 1, 4]
    assert (plain.tokens, plain.teacher_logits, plain.teacher_features) == (None, None, None)
    both = TargetBuilder()(batch(), Needs("token_targets", "teacher_logits"), 5, (2, 2))
    assert both.tokens is not None
    assert both.teacher_logits.shape == (4, 5)


def test_targets__custom_objective_gets_token_targets():
    """Label maps become token targets for any objective that declares the need, but not a teacher's logits."""
    ours = TargetBuilder(smoothing=0.2)(batch(), Needs("token_targets"), 5, (2, 3))
    expected = token_targets(*batch().label_map, (2, 3), 5, smoothing=0.2)
    torch.testing.assert_close(ours.tokens.to_dense(), expected.tokens)
    torch.testing.assert_close(ours.cls, expected.cls)
    assert ours.teacher_logits is None


def test_targets__from_a_teacher():
    class ColourTeacher(torch.nn.Module):
        provides = TEACHER

        def forward(self, images):
            return images.mean((2, 3))

        def features(self, images):
            return images.flatten(2).transpose(1, 2)

    made = TargetBuilder(teacher=ColourTeacher())(batch(), Needs("teacher_logits", "teacher_features"), 5, None)
    torch.testing.assert_close(made.teacher_logits, batch().image.mean((2, 3)))
    assert made.teacher_features.shape == (4, 64, 3)


def test_targets__without_maps_each_token_gets_the_label_of_its_image():
    objective = TokenLabelingLoss(token_weight=0)
    truth = F.one_hot(torch.tensor([0, 3, 1, 4]), 5) * 0.9 + 0.1 / 5
    plain = TargetBuilder()(batch(maps=False), objective, 5, (2, 2))
    torch.testing.assert_close((plain.cls, plain.tokens), (truth, truth[:, None]))
    mix = MixToken().for_batch(torch.Size((4, 3, 8, 8)), (4, 4), (0, 1))
    mixed = TargetBuilder()(batch(mix, maps=False), objective, 5, (4, 4))
    torch.testing.assert_close(mixed.cls, mix.share * truth + (1 - mix.share) * truth.flip(0))
    torch.testing.assert_close(mixed.tokens, truth[:, None])
    pixels = MixupCutMix(1.0, 0.0).for_batch(torch.Size((4, 3, 8, 8)), None, (0, 1))
    blended = TargetBuilder()(batch(pixels, maps=False), objective, 5, (4, 4))
    torch.testing.assert_close(blended.tokens[:, 0], pixels.probabilities(truth))


@pytest.mark.parametrize(("mode", "share_where_wrong"), [("published", 0.9), ("intended", 0.1)])
def test_ground_truth__as_in_the_official_code_and_as_in_its_comment(mode, share_where_wrong):
    label = torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]])
    truth = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    share = torch.tensor([[0.5], [share_where_wrong]])
    torch.testing.assert_close(blend_ground_truth(label, truth, mode), share * label + (1 - share) * truth)
    torch.testing.assert_close(blend_ground_truth(label, truth, "none"), label)
    torch.testing.assert_close(blend_ground_truth(label, truth, "only"), truth)


def test_target_builder__invalid_options_are_refused():
    with pytest.raises(ConfigError, match=r"ground_truth=maybe: must be one of none, published, intended"):
        TargetBuilder(ground_truth="maybe")
    with pytest.raises(ConfigError, match=r"smoothing=1: must be a number"):
        TargetBuilder(smoothing=1)
