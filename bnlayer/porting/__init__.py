"""Moving a whole model's weights between frameworks: planned first, then applied, then verified.

plan = bnlayer.porting.plan(checkpoint.open("resnet.weights.h5"), bnlayer.porting.read(model))
print(plan.report)                       # what goes where, what is assumed, what stands in the way
plan.apply().save("resnet.pt")
model = bnlayer.porting.load_into(model, "resnet.pt")
print(bnlayer.porting.verify(source_model, model))
"""

from __future__ import annotations

from ..errors import PortError
from .models import load_into, read
from .planning import Plan, plan
from .report import Report
from .rules import Rules
from .verification import Verification, verify

__all__ = ["Plan", "PortError", "Report", "Rules", "Verification", "load_into", "plan", "read", "verify"]
