// Sets the theme before the page is drawn, so that it does not flash. "auto" follows the system.
"use strict";
document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "auto";
