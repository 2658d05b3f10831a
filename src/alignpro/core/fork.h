#pragma once

namespace alignpro {

// A call into the engine by a thread that others do not wait for: while one lasts, locks may be
// held and work half done. A child that is forked meanwhile by another thread has them as they
// stood, and nobody who would release them: what it then asks of the engine is refused.
class EngineCall {
 public:
  EngineCall();  // throws Unavailable in such a child
  ~EngineCall();
  EngineCall(const EngineCall&) = delete;
  EngineCall& operator=(const EngineCall&) = delete;
};

// Whether this process was forked during another thread's call.
bool forked_in_call();

// Throws Unavailable where it was.
void require_not_forked_in_call();

}  // namespace alignpro
