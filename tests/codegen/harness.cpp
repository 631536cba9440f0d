// Asks the table `sample` from C++, for the differential test.
//
// stdin: queries of five int64: group, alignment, three sizes of which the group takes its first.
// stdout: one int32 each, what dks::find answers. Ends with code 1 where choose() says anything else.
#include <array>
#include <cstdio>
#include <string_view>

#include "table.hpp"

using Query = std::array<std::int64_t, 5>;

static bool agrees(const sample::Choice& choice, std::int32_t code) {
  if (choice.hit != (code >= 0)) return false;
  if (!choice.hit) return dks::miss(choice.miss) == code && choice.rule == -1 && *choice.candidate == '\0';
  return dks::hit(choice.rule, choice.match) == code &&
         choice.candidate == std::string_view(sample::rules[choice.rule].candidate);
}

int main() {
  static std::array<Query, 4096> queries;
  static std::array<std::int32_t, 4096> answers;
  while (const std::size_t count = std::fread(queries.data(), sizeof(Query), queries.size(), stdin)) {
    for (std::size_t i = 0; i < count; ++i) {
      const auto group = static_cast<std::int32_t>(queries[i][0]);
      const auto align = static_cast<std::int32_t>(queries[i][1]);
      const dks::Group& asked = sample::table.groups[group];
      answers[i] = dks::find(asked, sample::table.rules, &queries[i][2], align);
      const auto choice = dks::choose(sample::table, group, &queries[i][2],
                                      static_cast<std::size_t>(asked.dims), align);
      if (!agrees(choice, answers[i])) return 1;
    }
    if (std::fwrite(answers.data(), sizeof(std::int32_t), count, stdout) != count) return 1;
  }
  return 0;
}
