"""The tuned model as notebook 05 uses it."""

from collections.abc import Sequence

from catlib.classifiers.vlm import VLMClassifier
from catlib.settings import ServingSettings, split_list
from catlib.vlm.checkpoint import Checkpoint, open_vlm


def load_classifier(tuned: Checkpoint, breeds: Sequence[str], settings: ServingSettings) -> VLMClassifier:
    """The tuned model as the classifier that scores every breed, in the first of `serving_precisions`."""
    precision = split_list(settings.serving_precisions)[0]
    return VLMClassifier(open_vlm(tuned, device=settings.device, precision=precision), breeds)
