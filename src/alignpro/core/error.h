#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace alignpro {

// Every failure a caller can cause is one of these. Messages are one line: what was expected, what
// came, what to do. The binding maps each class to one Python exception.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A bad argument: Python's ValueError.
struct InvalidArgument : Error {
  using Error::Error;
};

// A model, adapter or tokenizer file that is missing, truncated, lying or unsupported:
// alignpro.ModelFileError. The message begins with the file's name.
struct FileError : Error {
  using Error::Error;
};

// Something this machine or build cannot do (an ISA, a backend, memory): alignpro.UnavailableError.
struct Unavailable : Error {
  using Error::Error;
};

// NaN where a number was due: alignpro.NumericError.
struct NumericError : Error {
  using Error::Error;
};

// Concatenates its arguments by operator<<; keeps throw sites on one line.
template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <typename Failure = InvalidArgument, typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw Failure(cat(parts...));
}

}  // namespace alignpro
