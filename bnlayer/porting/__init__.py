"""Moving a whole model's weights between frameworks: planned first, then applied, then verified."""
