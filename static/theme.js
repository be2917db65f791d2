// Runs before the first paint, so that no page flashes in the other theme; live.js does the rest.
document.documentElement.dataset.js = "";
try {
  document.documentElement.dataset.theme = localStorage.getItem("monitor-theme") || "system";
} catch {
  document.documentElement.dataset.theme = "system"; // storage is forbidden here
}
