"""The embedded default: a tiny model, its tokenizer and its data, all made here, trained through the three stages."""
