#pragma once

#include <filesystem>
#include <memory>

#include "alignpro/model/adapter.h"

namespace alignpro::model {

// A LoRA adapter in PEFT's format, as alignpro's runs write it: one rank and scale for all modules,
// named as the model's. Throws FileError for a file that is missing, damaged or asks for more, and
// for modules that the model does not have.
std::shared_ptr<const Adapter> load_peft_adapter(const ModelConfig& config,
                                                 const std::filesystem::path& folder);

// Throws FileError for a mixture of adapters (python/alignpro/models/mixture.py).
void require_no_mixture(const std::filesystem::path& folder);

}  // namespace alignpro::model
