#pragma once

#include <Python.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <optional>
#include <utility>

#include "alignpro/core/fork.h"

namespace alignpro::bindings {

// Releases the GIL for its lifetime.
//
// Unlike pybind11's, it may be left by a daemon thread while the interpreter goes away: up to
// Python 3.13 a thread that then asks for the GIL is ended by pthread_exit, whose forced unwinding
// through a destructor calls std::terminate. Such a thread sleeps here instead, until the process
// is gone.
class GilRelease {
 public:
  GilRelease() : call_(std::in_place), state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    call_.reset();
    returning().fetch_add(1);
    if (leaving().load() && pthread_equal(pthread_self(), leaver()) == 0) {
      returning().fetch_sub(1);
      for (;;) pause();
    }
    PyEval_RestoreThread(state_);
    returning().fetch_sub(1);
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

  // To be called when the module is loaded: a forked child has none of the threads that return.
  static void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { returning().store(0); });
  }

  // To be called at exit, with the GIL: from here on other threads do not come back. Waits for
  // those that are already asking for the GIL.
  static void stop_returning() {
    leaver() = pthread_self();
    leaving().store(true);
    while (returning().load() > 0) {
      PyThreadState* state = PyEval_SaveThread();
      usleep(1000);
      PyEval_RestoreThread(state);
    }
  }

 private:
  static std::atomic<bool>& leaving() {
    static std::atomic<bool> flag{false};
    return flag;
  }
  static std::atomic<int>& returning() {
    static std::atomic<int> count{0};
    return count;
  }
  static pthread_t& leaver() {
    static pthread_t thread{};
    return thread;
  }

  std::optional<EngineCall> call_;  // made first: it throws in a child that may not call
  PyThreadState* state_;
};

}  // namespace alignpro::bindings
