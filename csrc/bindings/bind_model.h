#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "alignpro/model/adapter.h"
#include "alignpro/model/config.h"

void bind_model(pybind11::module_& m);

namespace alignpro::bindings {

// What models on every device have in common.
pybind11::dict describe(const model::ModelConfig& config, int64_t context_length);
pybind11::dict lora_shapes(const model::ModelConfig& config);
std::shared_ptr<model::Adapter> make_adapter(const model::ModelConfig& config,
                                             const pybind11::dict& matrices, float scale);

}  // namespace alignpro::bindings
