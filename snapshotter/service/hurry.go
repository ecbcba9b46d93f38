// SPDX-License-Identifier: Apache-2.0

package service

import (
	"sync"
	"time"

	"github.com/cohort-project/cohort/runtime/urgent"
)

// hurryLimit is how long cohortd runs before others for a Take that does not come.
const hurryLimit = time.Second

// hurry has cohortd run before others from the end of a capture's Ready to its Take: containers stand
// still for what it does then, on a host that may be busy.
type hurry struct {
	mu   sync.Mutex
	held map[string]*held // by capture
}

type held struct {
	*urgent.Hurry
	timer *time.Timer
}

// approach begins it, and returns what raises the priority.
func (h *hurry) approach(id string) (raise func()) {
	u := &held{Hurry: urgent.Approach()}
	h.mu.Lock()
	defer h.mu.Unlock()
	if before := h.held[id]; before != nil {
		before.stop()
	}
	if h.held == nil {
		h.held = map[string]*held{}
	}
	h.held[id] = u
	u.timer = time.AfterFunc(hurryLimit, func() { h.drop(id, u) })
	return u.Raise
}

// drop ends it, if it has not ended.
func (h *hurry) drop(id string, u *held) {
	h.mu.Lock()
	defer h.mu.Unlock()
	u.stop()
	if h.held[id] == u {
		delete(h.held, id)
	}
}

func (u *held) stop() {
	u.timer.Stop()
	u.End()
}

// end ends it: at the capture's Take, or with the capture.
func (h *hurry) end(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if u := h.held[id]; u != nil {
		u.stop()
		delete(h.held, id)
	}
}
