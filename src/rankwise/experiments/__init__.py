"""Models, texts and comparisons for experiments that anybody can repeat."""
