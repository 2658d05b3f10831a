#include "alignpro/core/fork.h"

#include <pthread.h>

#include <atomic>

#include "alignpro/core/error.h"

namespace alignpro {
namespace {

std::atomic<int> calls{0};
thread_local int own_calls = 0;  // a signal handler may fork inside a call of its own thread
std::atomic<bool> abandoned{false};

void after_fork_in_child() {
  if (calls.exchange(own_calls) > own_calls) abandoned = true;
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);

}  // namespace

EngineCall::EngineCall() {
  require_not_forked_in_call();
  ++own_calls;
  ++calls;
}

EngineCall::~EngineCall() {
  --calls;
  --own_calls;
}

bool forked_in_call() { return abandoned.load(std::memory_order_relaxed); }

void require_not_forked_in_call() {
  if (forked_in_call()) {
    throw Unavailable(
        "this process was forked while another thread was inside alignpro's engine, whose state it "
        "cannot use; fork before that, or start it by \"spawn\" and load the model in it");
  }
}

}  // namespace alignpro
