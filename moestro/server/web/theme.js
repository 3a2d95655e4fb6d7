"use strict";
// Runs before the page is drawn, so that a chosen theme does not flash. Without a choice the system decides.
try {
  const theme = JSON.parse(localStorage.getItem("moestro.settings") || "{}").theme;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch (error) {
  console.info("no theme is remembered:", error.message);
}
