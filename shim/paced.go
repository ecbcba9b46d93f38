// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"

	"github.com/cohort-project/cohort/runtime/pace"
)

// paced is for what is done while the container runs: it gives way on a busy host. Where
// the container ends in the barrier nobody is there to give way to, or only for as long
// as it takes.
func (a *acts) paced(ctx context.Context) context.Context {
	if a.req.Stop {
		return ctx
	}
	return pace.With(ctx, pace.New(a.req.Pace))
}
