// Rewrites the lines of its input within a deadline, each on its own line of output:
//   rewrite MODEL.gguf RUN/adapter MILLISECONDS [SEED] < prompts.txt

#include <alignpro/prompter/prompter.h>

#include <chrono>
#include <exception>
#include <iostream>
#include <optional>
#include <string>

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "expected MODEL.gguf RUN/adapter MILLISECONDS [SEED]\n";
    return 2;
  }
  try {
    alignpro::Prompter prompter(argv[1], argv[2]);
    const std::chrono::milliseconds deadline(std::stol(argv[3]));
    std::optional<uint64_t> seed;
    if (argc > 4) seed = std::stoull(argv[4]);
    for (std::string prompt; std::getline(std::cin, prompt);) {
      const alignpro::Rewritten result = prompter.rewrite(prompt, deadline, seed);
      std::cout << result.prompt << '\n';
      std::cerr << result.reason << " after " << result.milliseconds << " ms, " << result.tokens
                << " tokens " << result.error << '\n';
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
