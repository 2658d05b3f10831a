#include "alignpro/prompter/prompt_format.h"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <string_view>
#include <tuple>
#include <utility>

#include "alignpro/core/error.h"
#include "alignpro/io/json.h"
#include "alignpro/model/model_files.h"
#include "alignpro/model/peft_adapter.h"

namespace alignpro {
namespace {

using engine::SamplingParams;
using io::Json;

constexpr const char* kFile = "prompter.json";

// The members of one JSON object, each of which must be there and of the kind that is asked for.
class Members {
 public:
  Members(std::string file, const Json* object) : file_(std::move(file)), object_(object) {
    require<FileError>(object != nullptr && object->object(), file_, ": expected an object");
  }

  Members inner(std::string_view key) const { return {cat(file_, ": ", key), &member(key)}; }
  std::string text(std::string_view key) const { return *wanted(key, member(key).string()); }
  bool boolean(std::string_view key) const { return *wanted(key, member(key).boolean()); }
  int64_t integer(std::string_view key) const { return *wanted(key, member(key).integer()); }
  double number(std::string_view key) const { return *wanted(key, member(key).number()); }
  const Json::Array& list(std::string_view key) const { return *wanted(key, member(key).array()); }

  // The index of a text among those that it may be.
  size_t choice(std::string_view key, std::initializer_list<std::string_view> known) const {
    const std::string given = text(key);
    const auto found = std::ranges::find(known, given);
    if (found == known.end()) {
      std::string names;
      for (const std::string_view name : known) names += cat(names.empty() ? "" : ", ", name);
      throw FileError(
          cat(file_, ": ", key, ": expected one of ", names, ", got ", io::printable(given)));
    }
    return static_cast<size_t>(found - known.begin());
  }

  // The two sides of a place in a text that holds it once.
  std::pair<std::string, std::string> sides(std::string_view key, std::string_view place) const {
    const std::string whole = text(key);
    const size_t at = whole.find(place);
    require<FileError>(at != whole.npos && whole.find(place, at + 1) == whole.npos, file_, ": ",
                       key, ": expected ", place, " in it, exactly once");
    return {whole.substr(0, at), whole.substr(at + place.size())};
  }

  void check(bool holds, std::string_view key, std::string_view expected) const {
    require<FileError>(holds, file_, ": ", key, ": expected ", expected);
  }

 private:
  const Json& member(std::string_view key) const {
    const Json* found = object_->find(key);
    require<FileError>(
        found != nullptr, file_, ": no \"", key,
        "\"; expected what train writes, which `alignpro train RUN/config.json --resume` "
        "writes anew");
    return *found;
  }
  template <typename Value>
  const Value* wanted(std::string_view key, const Value* value) const {
    require<FileError>(value != nullptr, file_, ": ", key, ": got a ", member(key).kind());
    return value;
  }

  std::string file_;
  const Json* object_;
};

SamplingParams sampling_of(const Members& from) {
  SamplingParams out;
  out.temperature = static_cast<float>(from.number("temperature"));
  out.top_k = static_cast<int32_t>(from.integer("top_k"));
  out.top_p = static_cast<float>(from.number("top_p"));
  out.min_p = static_cast<float>(from.number("min_p"));
  out.max_new_tokens = from.integer("max_new_tokens");
  out.min_new_tokens = from.integer("min_new_tokens");
  out.ignore_eos = from.boolean("ignore_eos");
  out.repetition_penalty = static_cast<float>(from.number("repetition_penalty"));
  out.presence_penalty = static_cast<float>(from.number("presence_penalty"));
  out.frequency_penalty = static_cast<float>(from.number("frequency_penalty"));
  for (const Json& stop : from.list("stop")) {
    from.check(stop.string() != nullptr, "stop", "texts");
    out.stop.push_back(*stop.string());
  }
  for (const Json& id : from.list("stop_token_ids")) {
    from.check(id.integer() && *id.integer() >= 0 && *id.integer() <= INT32_MAX, "stop_token_ids",
               "ids of tokens");
    out.stop_token_ids.push_back(static_cast<int32_t>(*id.integer()));
  }
  return out;
}

bool is_turn(const Message& message) {
  return message.role == "user" || message.role == "assistant";
}

// What is shown of a history, in the order in which it is cut.
std::vector<const Message*> in_order_of_cutting(const PromptFormat& format,
                                                const std::vector<Message>& history) {
  std::vector<const Message*> shown;
  for (const bool turns : {true, false}) {
    if (format.history == ShownHistory::kNone) break;
    if (!turns && format.history == ShownHistory::kTurns) break;
    for (const Message& message : history) {
      if (is_turn(message) == turns) shown.push_back(&message);
    }
  }
  return shown;
}

}  // namespace

PromptFormat PromptFormat::of_run(const std::filesystem::path& adapter) {
  model::require_no_mixture(adapter);
  const model::ModelFiles files(adapter);
  const std::string name = (adapter / kFile).string();
  const Json* root = files.json(kFile);
  require<FileError>(root != nullptr, name,
                     ": no such file; the adapter folder of a run has it, for others give Prompter "
                     "a PromptFormat");
  const Members all(name, root);
  const Members chat = all.inner("chat"), prompting = all.inner("prompting");
  PromptFormat out;
  out.chat_before = chat.text("before");
  out.chat_after = chat.text("after");
  out.chat_strips = chat.boolean("strips");
  std::tie(out.template_before, out.template_after) = prompting.sides("template", "{prompt}");
  std::tie(out.history_before, out.history_after) =
      prompting.sides("history_template", "{history}");
  out.history = static_cast<ShownHistory>(prompting.choice("history", {"none", "turns", "all"}));
  out.cut_history = prompting.choice("history_cut", {"nothing", "oldest"}) == 1;
  out.append = prompting.choice("mode", {"rewrite", "append"}) == 1;
  out.separator = prompting.text("separator");
  out.sampling = sampling_of(all.inner("sampling"));
  return out;
}

std::string PromptFormat::prompter_turn(const Conversation& conversation, size_t cut) const {
  constexpr std::array<std::string_view, 4> kRoles = {"system", "developer", "user", "assistant"};
  for (size_t i = 0; i < conversation.history.size(); ++i) {
    const std::string& role = conversation.history[i].role;
    require(std::ranges::find(kRoles, role) != kRoles.end(), "message ", i,
            ": expected one of the roles system, developer, user, assistant, got ",
            io::printable(role));
  }
  std::vector<const Message*> shown = in_order_of_cutting(*this, conversation.history);
  shown.erase(shown.begin(), shown.begin() + static_cast<ptrdiff_t>(std::min(cut, shown.size())));
  std::ranges::sort(shown);  // as they were said: all are elements of one vector
  std::string out;
  for (const Message* message : shown) {
    out += out.empty() ? history_before : "\n\n";
    // The role with a capital.
    out += cat(static_cast<char>(message->role[0] - 32), message->role.substr(1), ": ",
               message->content);
  }
  if (!shown.empty()) out += history_after;
  return cat(out, template_before, conversation.last_turn, template_after);
}

size_t PromptFormat::most_cut(const Conversation& conversation) const {
  return cut_history ? in_order_of_cutting(*this, conversation.history).size() : 0;
}

}  // namespace alignpro
