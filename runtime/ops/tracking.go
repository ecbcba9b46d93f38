// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
)

// EndTracking ends the tracking of writes that checkpoints with KeepTracking left in
// the members of a group, whoever took them: the next increment compares content. A
// group that is not there any more is not tracked, and neither is a member without a
// shim. Members that can be reached are not tracked when it returns an error for others.
func (h *Host) EndTracking(ctx context.Context, group string) error {
	all, err := h.List(ctx)
	if err != nil {
		return err
	}
	defer closeAll(all)
	var errs []error
	for _, c := range all {
		if c.Group != group {
			continue
		}
		err := h.dial(c)
		if err == nil {
			_, err = c.api.EndTracking(ctx, &memberAPI.EndTrackingRequest{Id: c.ID()})
			err = errgrpc.ToNative(err)
		}
		if err != nil && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("end the tracking of member %s: %w", c.Member, err))
		}
	}
	return errors.Join(errs...)
}
