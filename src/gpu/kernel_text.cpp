#include "gpu/kernel_text.h"

#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <regex>
#include <sstream>
#include <stdexcept>

namespace turboquant::gpu {
namespace {

std::string read(const std::string& path) {
  std::ifstream file(path);
  std::ostringstream text;
  if (!(text << file.rdbuf())) {
    throw std::runtime_error("[TURBOQUANT_KERNEL_SOURCES] " + path + " cannot be read");
  }
  return text.str();
}

/// As embed.cmake does: no comments, includes or indentation.
std::string stripped(std::string text) {
  text = std::regex_replace(text, std::regex("[ \t]*//[^\n]*"), "");
  text = std::regex_replace(text, std::regex("#pragma once|#include \"[^\n]*"), "");
  text = std::regex_replace(text, std::regex("\n[ \t]+"), "\n");
  return std::regex_replace(text, std::regex("\n\n+"), "\n");
}

}  // namespace

std::string source_checkout() {
  const char* found = std::getenv("TURBOQUANT_KERNEL_SOURCES");
  return found ? found : "";
}

std::string_view kernel_text(std::string_view built_in, std::string_view files) {
  const std::string checkout = source_checkout();
  if (checkout.empty()) return built_in;
  static std::mutex mutex;
  static std::map<std::string, std::string, std::less<>> texts;
  const std::lock_guard lock(mutex);
  if (const auto known = texts.find(files); known != texts.end()) return known->second;
  std::string all;
  std::istringstream list{std::string(files)};
  for (std::string file; std::getline(list, file, ';');) all += read(checkout + "/" + file);
  return texts.emplace(files, stripped(all)).first->second;
}

}  // namespace turboquant::gpu
