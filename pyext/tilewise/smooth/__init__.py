"""Smooth stand-ins for hard functions: what a metric or a choice is as a temperature goes to 0.

Every function takes `tau`. At tau > 0 it is differentiable; as tau falls to 0 it converges to the
hard function, at the rate that its docstring states; at tau=0 it is that limit, the metric itself,
without a gradient. Where values tie, the limit shares: two equal logits are each half the argmax.

float16 and bfloat16 are computed in float32. Values come back in the dtype that came; indices,
ranks and metrics are float32 (float64 for float64).
"""

from tilewise.smooth.classification import accuracy as accuracy
from tilewise.smooth.classification import auc as auc
from tilewise.smooth.classification import f1 as f1
from tilewise.smooth.classification import topk_accuracy as topk_accuracy
from tilewise.smooth.maximum import argmax as argmax
from tilewise.smooth.maximum import maximum as maximum
from tilewise.smooth.maximum import onehot_argmax as onehot_argmax
from tilewise.smooth.ranking import rank as rank
from tilewise.smooth.ranking import sort as sort
from tilewise.smooth.ranking import topk as topk
from tilewise.smooth.text import bleu as bleu
