// Owns whether the page follows a growing answer: it does at the end, and stops when the reader scrolls up.

const NEAR_PX = 40;

export class Following {
  /**
   * @param {HTMLButtonElement} button leads back to the end; shown while there is something below
   * @param {HTMLElement} dock what lies over the end of the page, and may become taller
   */
  constructor(button, dock) {
    this.button = button;
    this.isFollowing = true;
    this.isShown = false;
    this.last = 0;
    addEventListener("scroll", () => this.scrolled(), { passive: true });
    addEventListener("resize", () => this.grown());
    new ResizeObserver(() => this.grown()).observe(dock);
    button.addEventListener("click", () => this.toEnd());
  }

  get left() {
    const page = document.documentElement;
    return page.scrollHeight - page.clientHeight - scrollY;
  }

  scrolled() {
    if (!this.isShown) return;
    // However little the reader scrolls up, the page lets go; one that became shorter is still at its end.
    if (scrollY < this.last) this.isFollowing = this.left < 2;
    else if (this.left < NEAR_PX) this.isFollowing = true;
    this.last = scrollY;
    this.showButton();
  }

  /** The conversation has become longer. */
  grown() {
    if (!this.isShown) return;
    if (this.isFollowing) this.toEnd();
    else this.showButton();
  }

  toEnd() {
    this.isFollowing = true;
    scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
    this.last = scrollY;
    this.showButton();
  }

  showButton() {
    this.button.hidden = !this.isShown || this.isFollowing || this.left < NEAR_PX;
  }
}
