"""A Hugging Face folder as a model of CTranslate2: FOLDER OUT QUANTIZATION."""

from __future__ import annotations

import sys

from ctranslate2.converters import TransformersConverter

folder, out, quantization = sys.argv[1:]
TransformersConverter(folder).convert(out, quantization=quantization)
