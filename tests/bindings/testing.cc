// alignpro._testing: what the tests call and no user does. Built with -DALIGNPRO_TESTING=ON.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "alignpro/prompter/guards.h"
#include "alignpro/prompter/prompter.h"
#include "alignpro/prompter/reasoning.h"
#include "alignpro/prompter/tokenizer.h"
#include "alignpro/prompter/words.h"
#include "bindings/bind.h"
#include "cuda_ops.h"

namespace {

namespace py = pybind11;
using alignpro::Conversation;
using alignpro::Guards;
using alignpro::Prompter;
using alignpro::PromptFormat;
using alignpro::prompter::Tokenizer;
using Messages = std::vector<std::pair<std::string, std::string>>;  // (role, content)

void bind_tokenizer(py::module_& m) {
  py::class_<Tokenizer>(m, "Tokenizer")
      .def(py::init([](const std::string& path) {
             return std::make_unique<Tokenizer>(alignpro::model::ModelFiles(path));
           }),
           py::arg("path"))
      .def("encode", [](const Tokenizer& self, const std::string& before, const std::string& text,
                        const std::string& after) { return self.encode(before, text, after); })
      .def("join_bytes", [](const Tokenizer& self, const std::vector<int32_t>& tokens) {
        return py::bytes(self.join_bytes(tokens));
      });
  m.def("split_words", [](const std::string& text, const std::string& rule) {
    const auto words = split_words(text, *alignpro::prompter::find_word_rule(rule));
    return std::vector<std::string>(words.begin(), words.end());
  });
}

Conversation conversation_of(const Messages& history, const std::string& last_turn) {
  Conversation out{{}, last_turn};
  for (const auto& [role, content] : history) out.history.push_back({role, content});
  return out;
}

void bind_prompter(py::module_& m) {
  m.def("answer_of", [](const std::string& text, const std::string& prompt) {
    return std::string(alignpro::prompter::answer_of(text, prompt));
  });
  py::class_<Guards>(m, "Guards")
      .def(py::init([](bool spans, bool language, std::optional<double> max_growth,
                       int64_t free_characters, bool cut, bool answered, bool echo) {
             return Guards{spans, language, max_growth, free_characters, cut, answered, echo};
           }),
           py::kw_only(), py::arg("spans"), py::arg("language"), py::arg("max_growth"),
           py::arg("free_characters"), py::arg("cut"), py::arg("answered"), py::arg("echo"));
  m.def(
      "broken_guard",
      [](const std::string& prompt, const std::string& turn, const std::string& text, bool was_cut,
         bool append, const std::string& before, const std::string& after, const Guards& guards) {
        PromptFormat format;
        format.append = append;
        format.template_before = before;
        format.template_after = after;
        return std::string(
            alignpro::prompter::broken_guard({prompt, turn, text, was_cut}, format, guards));
      });
  m.def("prompter_turns",
        [](const std::string& adapter, const Messages& history, const std::string& last_turn) {
          const PromptFormat format = PromptFormat::of_run(adapter);
          const Conversation conversation = conversation_of(history, last_turn);
          std::vector<std::string> turns;
          for (size_t cut = 0; cut <= format.most_cut(conversation); ++cut) {
            turns.push_back(format.prompter_turn(conversation, cut));
          }
          return turns;
        });
  py::class_<Prompter>(m, "Prompter")
      .def(py::init([](const std::string& model, const std::string& adapter, int64_t context,
                       std::optional<Guards> guards) {
             const alignpro::PrompterOptions options{.threads = 1,
                                                     .context_length = context,
                                                     .kv_cache_bytes = int64_t{1} << 27,
                                                     .guards = guards};
             return std::make_unique<Prompter>(model, adapter, options);
           }),
           py::arg("model"), py::arg("adapter"), py::arg("context_length") = 0,
           py::arg("guards") = std::nullopt)
      .def(
          "rewrite",
          [](Prompter& self, const Messages& history, const std::string& last_turn, uint64_t seed,
             std::optional<int64_t> milliseconds) {
            const py::gil_scoped_release released;
            std::optional<std::chrono::nanoseconds> deadline;
            if (milliseconds) deadline = std::chrono::milliseconds(*milliseconds);
            const auto result = self.rewrite(conversation_of(history, last_turn), deadline, seed);
            return std::tuple(result.prompt, result.text, result.applied,
                              std::string(result.reason), result.tokens);
          },
          py::arg("history"), py::arg("last_turn"), py::arg("seed"),
          py::arg("milliseconds") = std::nullopt);
}

}  // namespace

PYBIND11_MODULE(_testing, m) {
  m.doc() =
      "What tests alone call: ops on device memory, whose tensors cross by DLPack, and the C++ "
      "prompter.";
  // Its exceptions are the ones that these ops raise.
  pybind11::module_::import("alignpro._core");
  translate_invalid_argument();
  bind_cuda_ops(m);
  bind_tokenizer(m);
  bind_prompter(m);
}
