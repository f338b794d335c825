// Loaded before the first paint (a module would come after it), so that a chosen theme never flashes.
// Without a choice the system's holds.
{
  let theme = null;
  try {
    theme = localStorage.getItem("nanoray:theme");
  } catch {
    // Storage is switched off: the system's theme it is.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
