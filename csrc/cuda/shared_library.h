#pragma once

// A library that is opened where it is needed and not linked.

#include <dlfcn.h>

#include <string>
#include <vector>

#include "alignpro/core/error.h"

namespace alignpro::cuda {

class SharedLibrary {
 public:
  // The first of `names` that opens; one without a slash is looked for where the loader looks. It
  // stays open: what it started on a GPU may end later than its last user. Throws Unavailable,
  // which says of each name why not, and `remedy`.
  SharedLibrary(const char* what, const std::vector<std::string>& names, const char* remedy) {
    std::string looked;
    for (const std::string& name : names) {
      library_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (library_ != nullptr) {
        name_ = name;
        return;
      }
      const char* why = dlerror();
      looked += cat(looked.empty() ? "" : ", ", why == nullptr ? name : why);  // it names the file
    }
    throw Unavailable(cat(what, ": not found, looked for ", looked, "; ", remedy));
  }

  // The function of that name. Throws Unavailable where the library has none.
  template <typename Function>
  Function* symbol(const char* name) const {
    void* found = dlsym(library_, name);
    if (found == nullptr)
      throw Unavailable(cat(name_, ": expected a function ", name, ", it has none"));
    return reinterpret_cast<Function*>(found);
  }

 private:
  void* library_ = nullptr;
  std::string name_;
};

}  // namespace alignpro::cuda
