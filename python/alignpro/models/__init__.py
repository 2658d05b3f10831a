"""Models behind one seam, `LanguageModel`: the native engine, its tokenizer, its files."""
