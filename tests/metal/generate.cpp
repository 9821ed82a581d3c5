// Writes the kernels that the tests launch as C++ files: the text MLX would hand to Metal, with a line before it that
// includes the emulator and lines after it that call the kernel.     generate OUTPUT_DIRECTORY FILES
// With `cost` after that: those that the cost model counts, in two files.
#include <fstream>
#include <iostream>
#include <set>

#include "support/metal_launches.h"

namespace {

using namespace emulator;

std::string call(const Recorded& r) {
  const std::string name = full_name(r.kernel, r.inputs, r.outputs);
  std::string text =
      "static void enter_" + name + "(void* const* buffers) {\n  " + name + "<" + template_list(r.kernel) + ">(\n";
  const auto buffers = buffers_of(r.kernel, r.inputs, r.outputs);
  for (size_t i = 0; i < buffers.size(); ++i) {
    text += "      static_cast<" + std::string(buffers[i].kind == BufferInfo::output ? "" : "const ") +
            buffers[i].type + "*>(buffers[" + std::to_string(i) + "]),\n";
  }
  const auto attributes = attributes_of(r.kernel.source);
  for (size_t i = 0; i < attributes.size(); ++i) {
    const auto& attribute = attributes[i].first;
    text += attribute == "thread_index_in_simdgroup"        ? "      emulator::position.lane"
            : attribute == "simdgroup_index_in_threadgroup" ? "      emulator::position.simdgroup"
            : attribute == "threadgroup_position_in_grid"
                ? "      uint3{emulator::position.group[0], emulator::position.group[1], emulator::position.group[2]}"
                : throw std::runtime_error("the emulator has no " + attribute);
    text += i + 1 < attributes.size() ? ",\n" : ");\n}\n";
  }
  return text + "static const emulator::Registration register_" + name + "(\"" + name + "\", enter_" + name + ");\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: generate OUTPUT_DIRECTORY FILES [cost]\n";
    return 1;
  }
  const int files = std::stoi(argv[2]);
  std::vector<Recorded> launches;
  recorder = &launches;
  const bool cost = argc > 3;
  cost ? record_cost_launches() : record_launches();
  // Each file holds one header text: two files for the codec, half of the others for each kind of attention.
  std::vector<std::string> texts(files);
  std::set<std::string> seen;
  std::vector<int> next(3, 0);
  for (const auto& r : launches) {
    if (!seen.insert(full_name(r.kernel, r.inputs, r.outputs)).second) continue;
    const int source = int(r.kernel.header);
    const int first = source == 0 ? 0 : source == 1 ? 2 : 2 + (files - 2) / 2;
    const int last = source == 0 ? 2 : source == 1 ? 2 + (files - 2) / 2 : files;
    std::string& text = texts[cost ? source == 0 : first + next[source]++ % (last - first)];
    if (text.empty())
      text = "#include <metal_stdlib>\n" + std::string(metal::source_text(r.kernel.header)) + "namespace {\n";
    text += kernel_text(r.kernel, r.inputs, r.outputs) + call(r);
  }
  for (int i = 0; i < files; ++i) {
    if (!texts[i].empty()) texts[i] += "}  // namespace\n";
    const std::string path = std::string(argv[1]) + "/kernels_" + std::to_string(i) + ".cpp";
    std::ifstream before(path);
    // A file that stays as it was is not compiled again.
    if (before && std::string(std::istreambuf_iterator<char>(before), {}) == texts[i]) continue;
    std::ofstream(path) << texts[i];
  }
}
