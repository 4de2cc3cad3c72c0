"""``scripts/bench resume``: a Redis that is resumed over a link, beside what people would use instead."""
