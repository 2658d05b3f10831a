#pragma once

// The whole test harness: CHECK fails loudly and counts; TEST registers a case; main runs them all.

#include <cmath>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

namespace check {

struct Case {
  const char* name;
  void (*body)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline bool add(const char* name, void (*body)()) {
  cases().push_back({name, body});
  return true;
}

inline void fail(const char* file, int line, const std::string& what) {
  ++failures();
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

inline int run_all() {
  int failed = 0;
  for (const Case& test : cases()) {
    const int before = failures();
    try {
      test.body();
    } catch (const std::exception& error) {
      fail(test.name, 0, std::string("unexpected exception: ") + error.what());
    }
    const bool ok = failures() == before;
    failed += ok ? 0 : 1;
    std::printf("%s %s\n", ok ? "ok  " : "FAIL", test.name);
  }
  std::printf("%d passed, %d failed\n", static_cast<int>(cases().size()) - failed, failed);
  return failed == 0 && !cases().empty() ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                           \
  static void name();                                        \
  static const bool name##_added = check::add(#name, &name); \
  static void name()

#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) check::fail(__FILE__, __LINE__, "CHECK failed: " #condition); \
  } while (0)

#define CHECK_EQ(a, b)                                                                    \
  do {                                                                                    \
    if (!((a) == (b))) check::fail(__FILE__, __LINE__, "CHECK_EQ failed: " #a " == " #b); \
  } while (0)

// The expression throws Type with `text` somewhere in its message.
#define CHECK_THROWS(expression, Type, text)                                                     \
  do {                                                                                           \
    bool thrown = false;                                                                         \
    try {                                                                                        \
      (void)(expression);                                                                        \
    } catch (const Type& error) {                                                                \
      thrown = std::string(error.what()).find(text) != std::string::npos;                        \
      if (!thrown) check::fail(__FILE__, __LINE__, std::string("message was: ") + error.what()); \
    }                                                                                            \
    if (!thrown) check::fail(__FILE__, __LINE__, "expected " #Type " from " #expression);        \
  } while (0)

#define CHECK_MAIN() \
  int main() { return check::run_all(); }
